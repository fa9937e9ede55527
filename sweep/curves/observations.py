"""Choose which losses of which trials the model sees, and on which scale.

A trial's curve is its lowest loss so far, because its adapter of that report is kept. What counts is
how far a loss lies above the best of its rung, so losses enter as

    log(1 + (loss - best(rung)) / c(rung)),    c(rung) = c(1) * (best(rung) / best(1)) ** 2,

which is linear near the best, where adapters are compared, and flattens where trials are hopeless.
The unit c(1) is a quantile of the excess at the first rung, within bounds in nats. Where the loss
itself falls to a part, differences fall faster: from 0.44 to 0.13 nats the spread of the better
trials shrank to a tenth, from 2.5 to 2.3 nats hardly. A diverged trial enters at its next rung, with
a loss that is far above all others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sweep.curves.situation import CurveState, Stand
from sweep.trials.record import Outcome

MOST_TRIALS, BEST_TRIALS = 96, 72  # of more, the best and a share of the others count
MOST_OBSERVATIONS = 160
UNIT_QUANTILE, LEAST_UNIT, MOST_UNIT = 0.25, 0.01, 0.15  # nats
LEVEL_STEP = 0.24  # rungs of one curve that the model sees are so far apart in log(tokens), 1 being first to last
DIVERGED_EXCESS = 20.0  # units
LEAST_SHARE = 0.05  # of the best first loss, for the unit


@dataclass(frozen=True)
class SeenCurve:
    """Hold one trial's lowest losses so far by rung, all finite, and whether it diverged after them."""

    state: CurveState
    losses: tuple[float, ...]
    is_diverged: bool

    @property
    def num_rungs(self) -> int:
        return len(self.losses)


@dataclass(frozen=True)
class Observations:
    """Hold the losses that the model sees.

    trial, rung: int64 [M], index into the trials seen, and rung from 0. value: float64 [M], in units.
    unit: the smallest unit, in nats.
    """

    trial: np.ndarray
    rung: np.ndarray
    value: np.ndarray
    unit: float


def curve_of(state: CurveState) -> SeenCurve:
    """Return the trial's curve, cut before its first loss that is not finite."""
    losses: list[float] = []
    for loss in state.losses:
        if not math.isfinite(loss):
            break
        losses.append(min(loss, losses[-1]) if losses else loss)
    is_diverged = state.outcome is Outcome.DIVERGED or len(losses) < len(state.losses)
    return SeenCurve(state, tuple(losses), is_diverged)


def seen_curves(curves: Iterable[SeenCurve]) -> list[SeenCurve]:
    """Return the curves that the model sees, by number: all, or the most promising and a share of the others."""
    told = [curve for curve in curves if curve.losses or curve.is_diverged or curve.state.stand is Stand.RUNNING]
    if len(told) <= MOST_TRIALS:
        return told
    best = _best_by_rung(told)
    order = sorted(told, key=lambda curve: (_rank(curve, best), curve.state.number))
    rest = order[BEST_TRIALS:]
    wanted = MOST_TRIALS - BEST_TRIALS
    kept = order[:BEST_TRIALS] + [rest[len(rest) * k // wanted] for k in range(wanted)]
    return sorted(kept, key=lambda curve: curve.state.number)


def observe(curves: Sequence[SeenCurve], progress: np.ndarray) -> Observations:
    """Return the losses of these curves. progress: float64 [R], see CurveModel."""
    best = _best_by_rung(curves)
    unit = unit_of(curves)
    units = {rung: unit * _share(loss, best[0]) ** 2 for rung, loss in best.items()}
    levels = _levels(progress)
    if sum(len(levels[curve.num_rungs]) for curve in curves) > MOST_OBSERVATIONS:
        levels = [kept[:2] for kept in levels]
    trial, rung, value = [], [], []
    for index, curve in enumerate(curves):
        for at in levels[curve.num_rungs]:
            trial.append(index)
            rung.append(at)
            value.append(math.log1p((curve.losses[at] - best[at]) / units[at]))
        at = curve.num_rungs
        if curve.is_diverged and at in best:
            trial.append(index)
            rung.append(at)
            value.append(math.log1p(DIVERGED_EXCESS))
    places = (np.array(trial, dtype=np.int64), np.array(rung, dtype=np.int64))
    return Observations(*places, np.array(value), min(units.values(), default=unit))


def unit_of(curves: Iterable[SeenCurve]) -> float:
    """Return the unit c(1) at the first rung, in nats."""
    first = [curve.losses[0] for curve in curves if curve.losses]
    if not first:
        return MOST_UNIT
    return float(np.clip(np.quantile(np.array(first) - min(first), UNIT_QUANTILE), LEAST_UNIT, MOST_UNIT))


def may_go_on(curve: SeenCurve, num_rungs: int) -> bool:
    """Return whether the trial waits for a slot."""
    return curve.state.stand is Stand.FREE and 0 < curve.num_rungs < num_rungs and not curve.is_diverged


def _best_by_rung(curves: Iterable[SeenCurve]) -> dict[int, float]:
    best: dict[int, float] = {}
    for curve in curves:
        for rung, loss in enumerate(curve.losses):
            best[rung] = min(loss, best.get(rung, math.inf))
    return best


def _share(loss: float, first: float) -> float:
    """Return which part of the first loss is left, within bounds."""
    return min(max(loss / first, LEAST_SHARE), 1.0) if first > 0.0 else 1.0


def _rank(curve: SeenCurve, best: dict[int, float]) -> float:
    """Return how little the model needs this curve: its excess, less for trials that are running."""
    if curve.state.stand is Stand.RUNNING:
        return -1.0
    return curve.losses[-1] - best[curve.num_rungs - 1] if curve.losses else math.inf


def _levels(progress: np.ndarray) -> list[list[int]]:
    """Return by number of losses the rungs that the model sees: the last, and fewer and fewer before it."""
    levels: list[list[int]] = [[]]
    for last in range(len(progress)):
        kept = [last]
        for rung in range(last - 1, -1, -1):
            if progress[rung] - progress[kept[-1]] >= LEVEL_STEP or rung == 0:
                kept.append(rung)
        levels.append(kept)
    return levels
