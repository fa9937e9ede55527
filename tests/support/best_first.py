"""Decide by losses alone: promote the best third of a rung, and keep the tokens to finish one trial.

This is the asynchronous successive halving of Li et al. (arXiv:1810.05934), with two changes. A
trial that is not promoted waits, and may be promoted later. Until a trial is complete, the tokens
that the most promising one needs to its end are spent on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from sweep.curves.situation import CurveState, Decision, GoOn, Situation, Stand, StartNew

FACTOR = 3


class BestFirst:
    """Promote the trial that has come farthest and is among the best third at its rung.

    If none deserves it, a new trial begins. If none may begin, the one with the lowest loss goes on.
    """

    def __init__(self, grid: Sequence[int]) -> None:
        """grid: tokens seen at each rung, ascending."""
        self._seen = (0, *grid)

    def decide(self, situation: Situation) -> Decision:
        """Return what one slot does next, or None if no step fits into the tokens that are left."""
        trials, left = situation.trials.values(), situation.tokens_left
        free = sorted((trial for trial in trials if trial.stand is Stand.FREE), key=_promise)
        best = min((trial for trial in trials if trial.stand is not Stand.OVER), key=_promise, default=None)
        kept = 0 if best is None or self._has_complete(trials) else self._to_finish(best)
        if free and free[0] is best and left < kept + self._seen[1]:
            return GoOn(best.number) if self._step(best) <= left else None
        limits = _limits(trials)
        # of the promoted, the one that has come farthest; of those, the one with the lowest loss
        promoted = [trial for trial in free if _promise(trial)[0] <= limits.get(len(trial.losses), -math.inf)]
        for trial in sorted(promoted, key=lambda trial: -len(trial.losses)):
            if self._step(trial) <= left - (0 if trial is best else kept):
                return GoOn(trial.number)
        if situation.candidates and self._seen[1] <= left - kept:
            return StartNew(situation.candidates[0])
        fitting = (trial for trial in free if self._step(trial) <= left - (0 if trial is best else kept))
        return next((GoOn(trial.number) for trial in fitting), None)

    def _has_complete(self, trials: Iterable[CurveState]) -> bool:
        return any(len(trial.losses) == len(self._seen) - 1 and not trial.is_earlier for trial in trials)

    def _to_finish(self, trial: CurveState) -> int:
        """Return the tokens to the trial's end. Those to a RUNNING trial's next rung are taken already."""
        rung = len(trial.losses) + (trial.stand is Stand.RUNNING)
        return self._seen[-1] - self._seen[rung]

    def _step(self, trial: CurveState) -> int:
        return self._seen[len(trial.losses) + 1] - self._seen[len(trial.losses)]


def _promise(trial: CurveState) -> tuple[float, int]:
    return (trial.losses[-1] if trial.losses else math.inf), trial.number


def _limits(trials: Iterable[CurveState]) -> dict[int, float]:
    """Return by rung the loss that just belongs to the best third; rungs with fewer than three have none."""
    by_rung: dict[int, list[float]] = {}
    for trial in trials:
        for rung, loss in enumerate(trial.losses, 1):
            by_rung.setdefault(rung, []).append(loss)
    return {rung: sorted(losses)[len(losses) // FACTOR - 1] for rung, losses in by_rung.items() if len(losses) >= FACTOR}
