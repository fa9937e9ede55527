"""Draw the report's figures for the page, no more often than they are worth.

A figure is drawn again when what it shows has changed, and not within twenty times the seconds that
drawing it took: with hundreds of trials the importance of parameters takes seconds of a core that
trials may need.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sweep.report.chart_data import HOURS, IMPORTANCE, MEMORY, PARALLEL, PARETO, SLICES, SLOTS
from sweep.report.collect import Collected
from sweep.report.page import LAYOUT, Section
from sweep.trials.record import Outcome

OF_COMPLETE = (PARALLEL, IMPORTANCE, SLICES)
FIGURES = (*OF_COMPLETE, PARETO, MEMORY, HOURS, SLOTS)
"""Titles in the page's order. The page draws the learning curves itself, as they grow."""
WORTH = 20.0
# figures drawn for white paper, on a dark page
ON_DARK = {
    "#2166ac": "#6aa9e9", "#66a5cf": "#a9d1ec", "#a6761d": "#d2a24c", "#1b9e77": "#3fc79a", "#8a8a8a": "#8f979e",
    "#c9c9c9": "#6c7278", "#d95f02": "#f08a3c", "#c51b7d": "#e868ad", "#7b3294": "#b57bd0", "#b2182b": "#ec6a6f",
    "#e6a700": "#ffc93c", "#222222": "#e4e7ea", "#999999": "#7c848b", "rgba(255,255,255,0.75)": "rgba(27,31,36,0.8)",
}  # fmt: skip


@dataclass(frozen=True)
class _Drawn:
    """Hold a figure as JSON, what it was drawn from, when, and how long that took."""

    basis: list[Any]
    text: str
    version: int
    at_s: float
    took_s: float


class DrawnFigures:
    """Hold the figures of one sweep. Any thread may ask; they are drawn one at a time."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic, self._lock = monotonic, threading.Lock()
        self._drawn: dict[tuple[str, bool], _Drawn] = {}

    def get(self, found: Collected, title: str, is_dark: bool, have: int | None = None) -> str | None:
        """Return a figure as JSON with its caption, version, and whether it `is_current`.

        `none` instead of a figure says why there is none, and neither is sent if the page has this
        version. None for a title that there is none of. have: the version that the page shows.
        """
        if title not in FIGURES:
            return None
        with self._lock:
            basis, known = _basis(found, title), self._drawn.get((title, is_dark))
            is_current = known is not None and _are_same(known.basis, basis)
            if known is None or not (is_current or self._monotonic() - known.at_s < WORTH * known.took_s):
                began_s, version = self._monotonic(), 1 + (known.version if known else 0)
                text = _drawn(found, title, is_dark)
                now_s = self._monotonic()
                known, is_current = _Drawn(basis, text, version, now_s, now_s - began_s), True
                self._drawn[title, is_dark] = known
        body = "" if have == known.version else f", {known.text}"
        return f'{{"version": {known.version}, "is_current": {json.dumps(is_current)}{body}}}'


def _basis(found: Collected, title: str) -> list[Any]:
    """Return the objects that a figure is drawn from."""
    if title in OF_COMPLETE:
        return [found.config, *(record for record in found.records if record.outcome is Outcome.COMPLETE)]
    return [found]


def _are_same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other))


def _drawn(found: Collected, title: str, is_dark: bool) -> str:
    from sweep.report.build import figure_sections  # late: it loads plotly, and the page shows its table first
    from sweep.report.study_figures import ON_BLACK, ON_WHITE

    return _figure_json(figure_sections(found, ON_BLACK if is_dark else ON_WHITE)[title](), is_dark)


def _figure_json(section: Section, is_dark: bool) -> str:
    """Return the members of a JSON object: caption, and figure or `none`."""
    if isinstance(section.body, str):
        return f'"caption": "", "none": {json.dumps(section.body)}'
    template, height = "plotly_dark" if is_dark else "plotly_white", section.body.layout.height or section.height
    clear = {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"}
    section.body.update_layout(**{**LAYOUT, "template": template, "height": height, **clear})
    text = section.body.to_json()
    for light, dark in ON_DARK.items() if is_dark else ():
        text = text.replace(f'"{light}"', f'"{dark}"')
    return f'"caption": {json.dumps(section.caption)}, "figure": {text}'
