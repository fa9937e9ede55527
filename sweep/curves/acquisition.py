"""Score what a slot can do next, and leave out what the tokens do not allow.

What a trial can gain is the expected improvement of its final loss over that of the expected winner
(Mockus et al., 1978). No trial needs to be trained to its end to see that it will not win, so the
score looks ahead to a rung r at which the trial is given up if it is then expected to lose:

    gain(r) = E[max(0, winner - end); the trial is expected to win at r]
    cost(r) = tokens to r + P(it is expected to win at r) * tokens from r to the end
    score   = max over r of gain(r) / cost(r).

This is the index of Pandora's box (Weitzman, 1979; for Bayesian optimisation Xie et al.,
arXiv:2406.20062) with one more decision inside the box, as a rate instead of at a fixed price. With
r = the last rung it is expected improvement for its cost. The expected winner is to be finished in any
case. Its own next rungs are scored by what they tell: the knowledge gradient (Frazier et al., 2009)
against the trial that comes closest. Its tokens stay for it anyway, so no rival passes it while the
tokens finish both: first the winner shows what it loses, or keeps, at the rung that the rival has seen.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from scipy.special import ndtr

NUM_NODES, FARTHEST = 21, 3.5  # of the integral over what rung r will tell, in standard deviations
LEAST_SPREAD = 1e-6
FIRST_BATCH, BATCH = 16, 64  # the best bounds alone often decide
AHEAD = 4
RIVAL = 0.05  # chance to end below the expected winner


@dataclass(frozen=True)
class Options:
    """Hold all that a slot may do: the trials that the model sees, then candidates. All arrays [Q].

    rung: int64, how many rungs it has reached. seen: int64, the tokens to there. price: int64, tokens to
    the next one. to_finish: int64, tokens to the last rung, without those that a running trial needs
    to its next rung. Both hold the set-up of a new trial. setup: int64, tokens that the slot does
    not train on meanwhile, 0 for the trial that holds it. may_run: bool, waits for a slot, or is new.
    may_win: bool, has begun, and has or can get an adapter at the last rung. has_begun, is_running: bool.
    """

    rung: np.ndarray
    seen: np.ndarray
    price: np.ndarray
    to_finish: np.ndarray
    may_run: np.ndarray
    may_win: np.ndarray
    has_begun: np.ndarray
    is_running: np.ndarray
    setup: np.ndarray


class Predictions(Protocol):
    """Declare what the scores need of the model (curve_model.Ends)."""

    mean: np.ndarray

    def spread(self, one: int) -> np.ndarray: ...
    def open_spread(self, one: int) -> np.ndarray: ...
    def told(self, options: np.ndarray, rungs: np.ndarray, other: int) -> np.ndarray: ...


def expected_improvement(behind: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Return E[max(0, -d)] for d normal with mean `behind` and standard deviation `deviation`."""
    z = behind / deviation
    density = np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    return np.maximum(deviation * density - behind * ndtr(-z), 0.0)


def expected_winner(options: Options, mean: np.ndarray, tokens_left: int) -> int | None:
    """Return which begun trial has the lowest expected loss of those that can be finished; None if none can."""
    possible = options.may_win & (options.to_finish <= tokens_left)
    return int(np.where(possible, mean, np.inf).argmin()) if possible.any() else None


def affordable(options: Options, winner: int, overtakes: np.ndarray, tokens_left: int) -> np.ndarray:
    """Return which steps leave the tokens to finish the expected winner and that trial itself: bool [Q].

    overtakes: float64 [Q], the chance that the trial ends below the winner. A trial that is running was
    begun to be finished if it goes well. Its tokens stay, the more the likelier it overtakes: many
    slots would begin more rivals than can be finished, and the tokens end before one is ahead.
    Its report may also change who wins. Until then, the tokens to finish any rival stay: a slot that
    waits costs less than a winner that was settled too early.
    """
    after = tokens_left - options.price
    is_winner = np.arange(len(after)) == winner
    needed = np.where(is_winner, 0, options.to_finish[winner])
    if options.is_running.any():
        rivals = options.may_win & (overtakes > RIVAL) & (options.to_finish <= tokens_left)
        needed = np.maximum(needed, np.where(rivals, options.to_finish, 0).max())
    begun = options.is_running & options.may_win & ~is_winner
    needed = needed + (np.minimum(2.0 * overtakes, 1.0) * options.to_finish)[begun].sum()
    return options.may_run & (options.price <= tokens_left) & (options.to_finish <= tokens_left) & (after >= needed)


def best_option(ends: Predictions, options: Options, grid: np.ndarray, winner: int, tokens_left: int) -> int | None:
    """Return the affordable option with the highest score, None if none is affordable.

    grid: int64 [R], tokens seen at each rung. Options are scored in the order of a bound on their
    scores, until no bound is higher than the best score. So no option's choice depends on how many
    others there are.
    """
    behind, spread = ends.mean - ends.mean[winner], ends.spread(winner)
    allowed = affordable(options, winner, ndtr(-behind / ends.open_spread(winner)), tokens_left)
    if not allowed.any():
        return None
    improvement = np.where(allowed, expected_improvement(behind, spread), -1.0)
    improvement[winner] = -1.0
    best, best_score = None, -1.0
    if allowed[winner]:
        best, best_score = winner, _winner_score(ends, options, grid, winner, improvement)
    bound = improvement / np.maximum(options.price + np.where(options.has_begun, options.setup, 0), 1)
    order = np.argsort(-bound, kind="stable")[: int(allowed.sum()) - int(allowed[winner])]
    starts = [0, *range(FIRST_BATCH, len(order), BATCH), len(order)]
    for start, end in itertools.pairwise(starts):
        batch = order[start:end]
        if not len(batch) or bound[batch[0]] <= best_score:
            break
        found = _scores(ends, options, grid, winner, batch, behind, spread)
        if found.max() > best_score:
            best, best_score = int(batch[found.argmax()]), float(found.max())
    return winner if best is not None and allowed[winner] and _passes(options, best, winner, tokens_left) else best


def _passes(options: Options, rival: int, winner: int, tokens_left: int) -> bool:
    """Return whether a begun rival would be trained past the expected winner although the tokens finish both.

    A score does not see that the winner's tokens are paid in any case. It would train rivals to their ends
    one after the other, each step makes the next one cheaper, while the winner waits at an early rung.
    """
    is_ahead = bool(options.has_begun[rival]) and options.rung[rival] >= options.rung[winner]
    return is_ahead and tokens_left >= options.to_finish[winner] + options.to_finish[rival]


def _scores(
    ends: Predictions, options: Options, grid: np.ndarray, winner: int, batch: np.ndarray, behind: np.ndarray, spread: np.ndarray
) -> np.ndarray:
    """Return the scores of some options that are not the winner: float64 [len(batch)]."""
    entry, rung = rungs_ahead(options, grid, batch)
    option = batch[entry]
    told = ends.told(option, rung, winner)
    left = np.sqrt(np.maximum(spread[option] ** 2 - told**2, 0.0))
    tokens, rest = grid[rung] - options.seen[option] + options.setup[option], grid[-1] - grid[rung]
    rate = _gain_rate(behind[option], told, left, tokens, rest)
    best = np.zeros(len(batch))
    np.maximum.at(best, entry, rate)
    return best


def _gain_rate(behind: np.ndarray, told: np.ndarray, left: np.ndarray, tokens: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Return gain / cost for each option and rung ahead: float64 [K]. All arguments [K]; see the module."""
    told, left = np.maximum(told, LEAST_SPREAD), np.maximum(left, LEAST_SPREAD)
    nodes = np.linspace(-FARTHEST, FARTHEST, NUM_NODES)
    weights = np.exp(-0.5 * nodes**2)
    later = behind[:, None] + told[:, None] * nodes
    gain = (expected_improvement(later, left[:, None]) * (later < 0.0)) @ (weights / weights.sum())
    gain = np.where(rest == 0, expected_improvement(behind, np.hypot(told, left)), gain)
    cost = tokens + ndtr(-behind / told) * rest
    return gain / np.maximum(cost, 1.0)


def _winner_score(ends: Predictions, options: Options, grid: np.ndarray, winner: int, improvement: np.ndarray) -> float:
    """Return what the winner's next rungs tell, next to the begun trial that may overtake it."""
    rivals = np.where(options.has_begun, improvement, -1.0)
    rival = int(rivals.argmax())
    if rivals[rival] < 0.0:
        return 0.0
    _, rung = rungs_ahead(options, grid, np.array([winner]))
    told = ends.told(np.full(len(rung), winner), rung, rival)
    ahead = max(float(ends.mean[rival] - ends.mean[winner]), 0.0)
    gain = expected_improvement(np.full(len(rung), ahead), np.maximum(told, LEAST_SPREAD))
    return float((gain / np.maximum(grid[rung] - options.seen[winner] + options.setup[winner], 1)).max())


def rungs_ahead(options: Options, grid: np.ndarray, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return entries: a place in the batch, and a rung ahead of this option. Both int64 [K]."""
    ladders = _ladders(tuple(grid.tolist()))
    ahead = [ladders[rung] for rung in options.rung[batch].tolist()]
    return np.repeat(np.arange(len(ahead)), [len(rungs) for rungs in ahead]), np.concatenate(ahead)


@lru_cache(maxsize=8)
def _ladders(grid: tuple[int, ...]) -> list[np.ndarray]:
    """Return by number of rungs reached the rungs to look ahead to, from 0.

    They are the next one, those at which four times, 16 times ... as many tokens have been seen, and
    the last.
    """
    last = len(grid) - 1
    later = [min(int(np.searchsorted(grid, AHEAD * tokens)), last) for tokens in grid]
    ladders = [np.array([], dtype=np.int64)] * (len(grid) + 1)
    for rung in range(last, -1, -1):
        rest = ladders[later[rung]] if rung < last else ladders[-1]
        ladders[rung] = np.concatenate([[rung], rest])
    return ladders
