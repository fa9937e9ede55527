"""Score what a slot can do next, and leave out what the tokens do not allow.

The score is the expected improvement of the final loss over that of the trial that is expected to
win (Mockus et al., 1978; Jones et al., 1998), for each token of the step to the next rung. The
expected winner is no fixed number: what counts is the spread of the difference of both final losses,
in which everything that they share falls out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr


@dataclass(frozen=True)
class Options:
    """Hold all that a slot may do: trials in the order of their numbers, then candidates. All arrays [Q].

    price: int64, tokens to the next rung. to_finish: int64, tokens to the last rung, without those that
    a running trial needs to its next rung. may_run: bool, waits for a slot, or is new. may_win: bool,
    has begun, and can still have an adapter at the last rung. mean: float64, expected final loss.
    """

    price: np.ndarray
    to_finish: np.ndarray
    may_run: np.ndarray
    may_win: np.ndarray


def expected_improvement(behind: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Return E[max(0, -d)] for d normal with mean `behind` and standard deviation `deviation`."""
    z = behind / deviation
    density = np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    return np.maximum(deviation * density - behind * ndtr(-z), 0.0)


def expected_winner(options: Options, mean: np.ndarray, tokens_left: int) -> int | None:
    """Return which begun trial has the lowest expected loss of those that can be finished; None if none can."""
    possible = options.may_win & (options.to_finish <= tokens_left)
    return int(np.where(possible, mean, np.inf).argmin()) if possible.any() else None


def affordable(options: Options, winner: int, tokens_left: int) -> np.ndarray:
    """Return which steps leave the tokens to finish the expected winner and that trial itself: bool [Q]."""
    price, to_finish = options.price, options.to_finish
    fits = options.may_run & (price <= tokens_left) & (to_finish <= tokens_left)
    leaves_rest = tokens_left - price >= to_finish[winner]
    leaves_rest[winner] = True
    return fits & leaves_rest


def best_option(options: Options, improvement: np.ndarray, winner: int, tokens_left: int) -> int | None:
    """Return the affordable step with the highest improvement for its price; None if there is none.

    A step of the expected winner is worth as much as the best of the others: both tell whether it
    wins.
    """
    allowed = affordable(options, winner, tokens_left)
    if not allowed.any():
        return None
    worth = np.where(allowed, improvement, -1.0)
    worth[winner] = -1.0
    if allowed[winner]:
        worth[winner] = max(float(worth.max()), 0.0)
    return int((worth / np.maximum(options.price, 1)).argmax())
