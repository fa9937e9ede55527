"""Tables and numbers in Markdown, as the leaderboard and the model card show them."""

from __future__ import annotations

import math


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    escaped = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in escaped)]


def number(value: float | None, spec: str) -> str:
    """`-` where there is none, or it is not finite."""
    return "-" if value is None or not math.isfinite(value) else format(value, spec)
