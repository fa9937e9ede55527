"""Format numbers, parameters and their values for the user."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from engine.errors import printable
from engine.trial_report import TrialReport


def number(value: float | None, spec: str) -> str:
    """Format a number; return `-` for None, an infinity or NaN."""
    return "-" if value is None or not math.isfinite(value) else format(value, spec)


def duration_text(seconds: float) -> str:
    """Format a duration in the unit that shows it in two or three digits: 40 s, 12 min, 3.4 h."""
    if seconds < 90.0:
        return f"{seconds:.0f} s"
    return f"{seconds / 60.0:.0f} min" if seconds < 5400.0 else f"{seconds / 3600.0:.1f} h"


def bytes_text(count: float) -> str:
    """Format bytes in the unit that shows them in few digits: 0.1 MiB, 12 MiB, 3.4 GiB."""
    digits = 1 if count < 10 * 2**20 else 0
    return f"{count / 2**20:,.{digits}f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"


def short_name(path: str) -> str:
    """Return the end of a field's path that tells it from others: `rank`, or `train.0.weight` of a mixture."""
    return ".".join(path.split(".")[1:]) if path.count(".") > 1 else path.rsplit(".", 1)[-1]


def params_text(params: dict[str, Any]) -> str:
    """Format sampled values by the end of their path: rank=8 learning_rate=0.00042 train.0.weight=3."""
    parts = (f"{printable(short_name(path))}={value_text(value)}" for path, value in params.items())
    return " ".join(parts) or "(base config)"


def value_text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else printable(str(value))


def printable_lines(text: str) -> str:
    """Escape what would steer a terminal, but keep the line ends of our own text."""
    return "\n".join(map(printable, text.split("\n")))


def without_password(text: str) -> str:
    """Return the text without user and password of the addresses in it."""
    return re.sub(r"//[^/\s]*@", "//", text)


def limits_text(report: TrialReport) -> str:
    """Return `, 0.0312 nats above its limits`, or nothing for a report within them."""
    return f", {report.over_limits:.4f} nats above its limits" if report.over_limits else ""


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Return `, exact_match 0.7500` for each task metric; empty without any."""
    return "".join(f", {name} {value:.4f}" for name, value in metrics.items())
