"""Units that both halves count in."""

from __future__ import annotations

import math

GIB = 2**30
MAX_EXPONENT = 700.0  # exp() of more is no float64


def perplexity(loss: float) -> float:
    """exp(loss), loss in nats a token; the largest value that a float holds where the loss has exploded."""
    return math.exp(min(loss, MAX_EXPONENT))
