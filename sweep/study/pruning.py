"""The pruner's verdicts, as a function of what trials have reported and of nothing else.

Successive halving and Hyperband remember whom they judged where. In the journal, a kill between such a note and the end of the
trial would make the same verdict come out otherwise on resume. So the notes are in memory only, and are made again from the
reports in the journal.
"""

from __future__ import annotations

from optuna.trial import FrozenTrial, TrialState

from sweep.study.pruners import Curve, Pruner


class Pruning:
    """A pruner and all it has seen. Hear of every trial, report and end, in the order in which the journal has them."""

    def __init__(self, pruner: Pruner, num_rungs: int, trials: list[FrozenTrial]) -> None:
        """trials: those in the journal. The last rung of a running one is not judged yet."""
        self._pruner, self._num_rungs = pruner, num_rungs
        self._curves: dict[int, Curve] = {}  # of trials that have not ended
        self._unjudged: set[int] = set()
        for trial in trials:
            self.on_entered(trial)

    def on_entered(self, trial: FrozenTrial) -> None:
        """A trial that the journal has, with what it has reported so far."""
        self._curves[trial.number] = {}
        for rung in sorted(trial.intermediate_values):
            self.on_reported(trial.number, rung, trial.intermediate_values[rung])
        if trial.state.is_finished():
            self.should_prune(trial.number)
            self.on_ended(trial)

    def on_reported(self, number: int, rung: int, eval_loss: float) -> None:
        """A trial that reports again was not pruned at the rung before: where a kill took that verdict's notes, they are made
        now, before the pruner sees more than it saw then."""
        if number in self._unjudged:
            self.should_prune(number)
        self._curves[number][rung] = eval_loss
        self._unjudged.add(number)

    def should_prune(self, number: int) -> bool:
        """The verdict on the last reported rung. Ask once a rung: successive halving judges each only once. A trial at its last
        rung is complete."""
        self._unjudged.discard(number)
        curve = self._curves[number]
        return bool(curve) and max(curve) < self._num_rungs and self._pruner.prunes(number, curve)

    def on_ended(self, trial: FrozenTrial) -> None:
        """As the journal has it."""
        self._unjudged.discard(trial.number)
        self._pruner.on_ended(trial.number, self._curves.pop(trial.number), trial.state is TrialState.COMPLETE)
