"""Drafts: what the sampler proposes, on a copy of the study in memory. Optuna enters here, in study.py and in samplers.py.

The copy follows the journal trial by trial, under the same numbers and the same study name, because Hyperband picks a trial's
bracket from them. It is made anew only where the numbers have drifted apart: after a proposal that was known already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from sweep.config import GpConfig, SamplerConfig
from sweep.samplers import as_seen
from sweep.space import Space

NUM_SAMPLER_ATTEMPTS = 20  # then random draws: a sampler that insists on a known point has nothing new to say
NUM_RANDOM_ATTEMPTS = 200
IsNew = Callable[[dict[str, Any]], bool]


class Drafts:
    """Proposes trials that are new. Nothing of it is in the journal yet."""

    def __init__(
        self,
        study_name: str,
        config: SamplerConfig,
        sampler: optuna.samplers.BaseSampler,
        pruner: optuna.pruners.BasePruner,
        space: Space,
        num_objectives: int,
    ) -> None:
        self._name, self._config, self._sampler, self._pruner, self._space = study_name, config, sampler, pruner, space
        self._num_objectives = num_objectives
        self._copy: optuna.Study | None = None
        self._num_trials = 0  # of the copy

    def propose(self, trials: list[FrozenTrial], is_new: IsNew) -> FrozenTrial | None:
        """What the sampler proposes, if it proposes something new within a number of attempts. trials: those of the journal.

        Rejected proposals stay in the copy as running trials while it tries again, which pushes a constant-liar sampler away.
        """
        if self._copy is None or self._num_trials != len(trials) or isinstance(self._config, GpConfig):
            self._copy = self._study(self._sampler)
            self._copy.add_trials(as_seen(self._config, trials, self._num_objectives))
            self._num_trials = len(trials)
        return self._attempt(self._copy, NUM_SAMPLER_ATTEMPTS, is_new)

    def draw(self, seed: int, is_new: IsNew) -> FrozenTrial | None:
        """A random point nobody tried; None where none is found within a number of attempts."""
        study = self._study(optuna.samplers.RandomSampler(seed=seed))
        return self._attempt(study, NUM_RANDOM_ATTEMPTS, is_new)

    def fixed(self, params: dict[str, Any]) -> FrozenTrial:
        """The trial with just these values."""
        study = self._study(optuna.samplers.RandomSampler())
        study.enqueue_trial(params)
        trial = study.ask()
        self._space.suggest(trial)
        return study.get_trials(deepcopy=False)[trial.number]

    def entered(self, trial: FrozenTrial) -> None:
        """The journal has a new trial: bring the copy to the same state."""
        if self._copy is None:
            return
        if self._num_trials == trial.number:
            self._copy.add_trial(trial)
            self._num_trials += 1
        elif self._num_trials == trial.number + 1:
            if trial.state.is_finished():
                self.ended(trial)
        else:
            self._copy = None

    def ended(self, trial: FrozenTrial) -> None:
        """A trial of the journal has ended: so it does in the copy."""
        if self._copy is None:
            return
        storage = self._copy._storage
        trial_id = storage.get_trial_id_from_study_id_trial_number(self._copy._study_id, trial.number)
        for step, value in trial.intermediate_values.items():
            storage.set_trial_intermediate_value(trial_id, step, value)
        for name, excess in trial.constraints.items():
            optuna.Trial(self._copy, trial_id).set_constraint(name, excess)
        storage.set_trial_state_values(trial_id, trial.state, trial.values)

    def _attempt(self, study: optuna.Study, num_attempts: int, is_new: IsNew) -> FrozenTrial | None:
        for _ in range(num_attempts):
            trial = study.ask()
            if study is self._copy:
                self._num_trials = trial.number + 1
            if is_new(self._space.suggest(trial)):
                return study._storage.get_trial(trial._trial_id)
        return None

    def _study(self, sampler: optuna.samplers.BaseSampler) -> optuna.Study:
        return optuna.create_study(
            study_name=self._name, sampler=sampler, pruner=self._pruner, directions=["minimize"] * self._num_objectives
        )
