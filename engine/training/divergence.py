"""When a trial has diverged: going on would only burn GPU time. No torch."""

from __future__ import annotations

import math

from engine.errors import DivergedError

EXPLODED = 2.0  # times the loss of guessing every token alike; a model that has merely forgotten everything comes near 1


def check_step(loss: float, grad_norm: float, vocab_size: int) -> None:
    """Raise DivergedError where an optimizer step shows that nothing more is learned. loss: mean nats per target token.

    A gradient of exactly zero at a loss that is not zero is one that underflowed, or that never reached the adapter; a data set
    learned by heart has both at zero, and has not diverged.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise DivergedError(f"loss is {loss}, gradient norm is {grad_norm}")
    if grad_norm == 0.0 and loss > 0.0:
        raise DivergedError(f"gradient norm is 0 at loss {loss:.4g}: nothing is learned")
    check_loss("loss", loss, vocab_size)


def check_loss(name: str, loss: float, vocab_size: int) -> None:
    """Raise DivergedError for a loss that no useful model has."""
    limit = EXPLODED * math.log(vocab_size)
    if not loss <= limit:
        raise DivergedError(f"{name} is {loss:.4g}; above {limit:.4g}, twice that of guessing every token alike, it has exploded")
