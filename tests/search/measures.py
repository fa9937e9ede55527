"""Compute what the tables show: regret, its intervals, and how early losses rank trials."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
from scipy.stats import spearmanr

from .clock import Choice
from .points import Task

NEAR = 0.005  # nats: seeds differ by about as much
NUM_RESAMPLES = 2000
UNKNOWN = math.log(49_152)  # nats of guessing: the loss of a strategy that has no adapter to hand out


@dataclass(frozen=True)
class Regret:
    """Say in nats how far the chosen adapter is from the best of the table.

    seen: by the losses that the strategy saw. judged: by the other seed of the same config where
    one was recorded, above the lowest mean over seeds. Luck that a strategy chose does not help
    there.
    """

    seen: float
    judged: float


class Judge:
    """Know the best of a task's table."""

    def __init__(self, task: Task) -> None:
        self._task = task
        scores = [[point.score(seed) for seed in range(len(point.curves))] for point in task.points]
        self._lowest_mean = min(sum(known) / len(known) for known in scores)
        self._scores = scores

    def regret(self, choice: Choice | None, seeds: Sequence[int]) -> Regret:
        """seeds: which curve each point showed in the replay."""
        best = min(known[seed] for known, seed in zip(self._scores, seeds))
        if choice is None:
            return Regret(UNKNOWN - best, UNKNOWN - self._lowest_mean)
        curves, seed = self._task.points[choice.point].curves, seeds[choice.point]
        seen, other = curves[seed][choice.rung - 1], curves[1 - seed if len(curves) > 1 else seed]
        judged = other[choice.rung - 1] if choice.rung <= len(other) else UNKNOWN
        return Regret(seen - best, judged - self._lowest_mean)


def interval(values: Sequence[float], statistic: Callable[..., numpy.ndarray] = numpy.mean) -> tuple[float, float]:
    """Return the 95 % interval of a mean over replays, by bootstrap (percentiles)."""
    rng, known = numpy.random.default_rng(0), numpy.asarray(values, float)
    drawn = known[rng.integers(0, len(known), (NUM_RESAMPLES, len(known)))]
    low, high = numpy.percentile(statistic(drawn, axis=1), (2.5, 97.5))
    return float(low), float(high)


def ratio_interval(values: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Return mean(values) / mean(others) with its 95 % interval; replays are drawn in pairs."""
    rng, a, b = numpy.random.default_rng(0), numpy.asarray(values, float), numpy.asarray(others, float)
    index = rng.integers(0, len(a), (NUM_RESAMPLES, len(a)))
    below = numpy.maximum(b[index].mean(1), 1e-9)
    low, high = numpy.percentile(a[index].mean(1) / below, (2.5, 97.5))
    return float(a.mean() / max(b.mean(), 1e-9)), float(low), float(high)


def difference_interval(values: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Return mean(values - others) with its 95 % interval; replays are drawn in pairs."""
    gaps = numpy.asarray(values, float) - numpy.asarray(others, float)
    return (float(gaps.mean()), *interval(gaps))


def rank_correlations(curves: Sequence[Sequence[float]], finals: Sequence[float]) -> list[float]:
    """Return Spearman's correlation of the losses at each rung with the final losses.

    Trials that had diverged by a rung are left out there.
    """
    found = []
    for rung in range(max(map(len, curves))):
        pairs = [(curve[rung], final) for curve, final in zip(curves, finals) if len(curve) > rung and math.isfinite(final)]
        found.append(float(spearmanr(*zip(*pairs)).statistic))
    return found
