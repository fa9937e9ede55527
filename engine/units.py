"""Define units that the engine and the sweep share."""

from __future__ import annotations

import math

GIB = 2**30
MAX_EXPONENT = 700.0  # exp() of more overflows float64


def perplexity(loss: float) -> float:
    """Return exp(loss) for a loss in nats per token, capped at exp(700) to stay a float."""
    return math.exp(min(loss, MAX_EXPONENT))


def counted(number: int | float, thing: str) -> str:
    """Return the number with its thing in the singular or the plural: `1 row`, `1,024 rows`, `2.5 rows`."""
    shown = f"{int(number):,}" if float(number).is_integer() else f"{number:,.4g}"
    return f"{shown} {thing}{'' if number == 1 else 's'}"
