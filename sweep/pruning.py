"""The pruner's verdicts, as a function of what trials have reported and of nothing else.

Successive halving and Hyperband write notes of their own beside a trial's reports while they judge. In the journal, a kill
between such a note and the end of the trial would make the same verdict come out otherwise on resume. So the pruner judges a copy
of the study in memory, which is made again from the reports in the journal, and its notes live there only.
"""

from __future__ import annotations

import optuna
from optuna.trial import FrozenTrial, TrialState


class Pruning:
    """A pruner and all it has seen. Hear of every trial, report and end, in the order in which the journal has them."""

    def __init__(self, pruner: optuna.pruners.BasePruner, study_name: str, num_rungs: int, trials: list[FrozenTrial]) -> None:
        """trials: those in the journal. The last rung of a running one is not judged yet. Hyperband picks a trial's bracket from
        the study's name."""
        self._pruner, self._num_rungs = pruner, num_rungs
        self._storage = optuna.storages.InMemoryStorage()
        self._study = optuna.create_study(storage=self._storage, study_name=study_name, pruner=pruner)
        self._ids: list[int] = []  # by number
        self._unjudged: set[int] = set()
        for trial in trials:
            self.entered(trial)

    def entered(self, trial: FrozenTrial) -> None:
        """A trial that the journal has, with what it has reported so far."""
        self._ids.append(self._storage.create_new_trial(self._study._study_id, _running(trial)))
        for rung in sorted(trial.intermediate_values):
            self.reported(trial.number, rung, trial.intermediate_values[rung])
        if trial.state.is_finished():
            self.should_prune(trial.number)
            self.ended(trial)

    def reported(self, number: int, rung: int, eval_loss: float) -> None:
        """A trial that reports again was not pruned at the rung before: where a kill took that verdict's notes, they are made
        now, before the pruner sees more than it saw then."""
        if number in self._unjudged:
            self.should_prune(number)
        self._storage.set_trial_intermediate_value(self._ids[number], rung, eval_loss)
        self._unjudged.add(number)

    def should_prune(self, number: int) -> bool:
        """The verdict on the last reported rung. Ask once a rung: successive halving judges each only once. A trial at its last
        rung is complete."""
        self._unjudged.discard(number)
        trial = self._storage.get_trial(self._ids[number])
        if not trial.intermediate_values or trial.last_step >= self._num_rungs:
            return False
        return bool(self._pruner.prune(self._study, trial))

    def ended(self, trial: FrozenTrial) -> None:
        """As the journal has it; of several objectives, the first is the loss."""
        self._storage.set_trial_state_values(self._ids[trial.number], trial.state, trial.values and trial.values[:1])


def _running(trial: FrozenTrial) -> FrozenTrial:
    return optuna.trial.create_trial(state=TrialState.RUNNING, params=trial.params, distributions=trial.distributions)
