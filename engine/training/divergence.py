"""Detect that a trial has diverged, so that it stops using GPU time."""

from __future__ import annotations

import math

from engine.errors import DivergedError

# Limit, in multiples of the loss of a uniform guess. A model that has forgotten everything comes
# near 1, so 2 means that the loss exploded.
EXPLODED = 2.0


def check_step(loss: float, grad_norm: float, vocab_size: int) -> None:
    """Raise DivergedError if an optimizer step shows that the adapter no longer learns.

    loss: mean nats per target token. A gradient of exactly zero at a loss above zero has
    underflowed, or never reached the adapter. Both are zero for a memorised data set, which has not
    diverged.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise DivergedError(f"loss is {loss}, gradient norm is {grad_norm}")
    if grad_norm == 0.0 and loss > 0.0:
        raise DivergedError(f"gradient norm is 0 at loss {loss:.4g}: the adapter learns nothing")
    check_loss("loss", loss, vocab_size)


def check_loss(name: str, loss: float, vocab_size: int) -> None:
    """Raise DivergedError for a loss in nats per token that no useful model has."""
    limit = EXPLODED * math.log(vocab_size)
    if not loss <= limit:
        raise DivergedError(f"{name} is {loss:.4g} and has exploded: the limit is {limit:.4g}, twice the loss of a uniform guess")
