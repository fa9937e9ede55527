"""Compute the pruner's verdicts from the trials' reports, and from nothing else.

Successive halving and Hyperband note which trial they judged at which rung. If the journal held
these notes, a kill between a note and the trial's end would change the verdict on resume. The notes
are therefore kept in memory only, and made again from the journal's reports.
"""

from __future__ import annotations

from optuna.trial import FrozenTrial, TrialState

from sweep.study.journal import warm_of
from sweep.study.pruners import Curve, Pruner


class Pruning:
    """Hold a pruner and all it has seen.

    The caller passes on every trial, report and end, in the order of the journal.
    """

    def __init__(self, pruner: Pruner, num_rungs: int, trials: list[FrozenTrial]) -> None:
        """Replay the journal's trials. The last rung of a running one is not judged yet."""
        self._pruner, self._num_rungs = pruner, num_rungs
        self._curves: dict[int, Curve] = {}  # number -> curve, of open trials
        self._unjudged: set[int] = set()
        for trial in trials:
            self.on_entered(trial)

    def on_entered(self, trial: FrozenTrial) -> None:
        """Take in a trial of the journal, with its reports so far. A warm clone is neither judged nor compared with."""
        if warm_of(trial) is not None:
            return
        self._curves[trial.number] = {}
        for rung in sorted(trial.intermediate_values):
            self.on_reported(trial.number, rung, trial.intermediate_values[rung])
        if trial.state.is_finished():
            self.should_prune(trial.number)
            self.on_ended(trial)

    def on_reported(self, number: int, rung: int, eval_loss: float) -> None:
        """Take in a report. First replay the previous verdict if a kill lost it.

        A trial that reports again was not pruned at the rung before. The replay comes before the
        new report, so that the pruner sees only the data that it had then.
        """
        if number not in self._curves:
            return
        if number in self._unjudged:
            self.should_prune(number)
        self._curves[number][rung] = eval_loss
        self._unjudged.add(number)

    def should_prune(self, number: int) -> bool:
        """Return the verdict on the last reported rung. A trial at its last rung is complete.

        Ask once a rung, because successive halving judges each rung only once.
        """
        self._unjudged.discard(number)
        curve = self._curves.get(number)
        return bool(curve) and max(curve) < self._num_rungs and self._pruner.prunes(number, curve)

    def on_ended(self, trial: FrozenTrial) -> None:
        """Take in a trial's end, with its state in the journal."""
        if trial.number not in self._curves:
            return
        self._unjudged.discard(trial.number)
        self._pruner.on_ended(trial.number, self._curves.pop(trial.number), trial.state is TrialState.COMPLETE)
