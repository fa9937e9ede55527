"""Propose trials, on a copy of the study in memory.

The copy follows the journal trial by trial, because making a new one for each proposal cost as much
as the proposal.

Hyperband picks a trial's bracket from study name and number. For Hyperband alone, the copy
therefore has the journal's numbers, and is made again once they differ.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from itertools import islice
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from sweep.config.sampler_options import GpConfig, RandomConfig, SamplerConfig, TpeConfig
from sweep.space.space import Space
from sweep.study.journal import warm_of
from sweep.study.samplers import as_seen, is_feasible, make_sampler, proposal_seed

NUM_SAMPLER_ATTEMPTS = 20  # then random draws, since the sampler only repeats known points
NUM_RANDOM_ATTEMPTS = 200
MOST_SEEN = 256  # trials in a copy for TPE; a proposal takes 5 ms with so many, 17 ms with 600
# thinned to: all trials, the best, at least so many others; TPE never counts more than 25 as good
FEWEST_SEEN, BEST_SEEN, LEAST_SHARE = 192, 32, 64
# draws for each trial of the share: enough if a quarter qualifies, without a walk through all
DRAWN_AT_ONCE = 4
IsNew = Callable[[dict[str, Any]], bool]


class Proposer:
    """Propose trials that are new. The journal has none of them yet."""

    def __init__(
        self,
        study_name: str,
        config: SamplerConfig,
        seed: int,
        pruner: optuna.pruners.BasePruner,
        space: Space,
        num_objectives: int,
    ) -> None:
        self._name, self._config, self._seed, self._pruner, self._space = study_name, config, seed, pruner, space
        self._num_objectives = num_objectives
        self._keeps_numbers = isinstance(pruner, optuna.pruners.HyperbandPruner)
        self._is_bounded = isinstance(config, TpeConfig) and num_objectives == 1 and not self._keeps_numbers
        self._copy: optuna.Study | None = None
        self._ids: dict[int, int] = {}  # number in the journal -> id in the copy, of open trials
        self._draft_id: int | None = None
        self._border = 0  # the copy has only a part of the trials before this number

    def propose(self, number: int, trials: Callable[[], list[FrozenTrial]], is_new: IsNew) -> FrozenTrial | None:
        """Return the sampler's proposal for trial `number`, or None if no attempt gives a new one.

        trials: returns those of the journal. Each number gets a new sampler with its own seed,
        because a resume cannot restore a sampler's state.

        While the sampler tries again, rejected proposals stay in the copy as running trials. That
        pushes a constant-liar sampler away from them.
        """
        if isinstance(self._config, RandomConfig):  # it ignores earlier trials
            study = self._study(make_sampler(self._config, proposal_seed(self._seed, number)))
            return self._attempt(study, NUM_SAMPLER_ATTEMPTS, is_new)[0]
        border = thinned_before(number) if self._is_bounded else 0
        if self._copy is None or isinstance(self._config, GpConfig) or border != self._border:
            self._make_copy(trials(), border)
        self._copy.sampler = make_sampler(self._config, proposal_seed(self._seed, number))
        draft, rejected = self._attempt(self._copy, NUM_SAMPLER_ATTEMPTS, is_new)
        for trial in rejected:
            self._copy._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        self._draft_id = None if draft is None else draft._trial_id
        if rejected and self._keeps_numbers:
            self._copy = self._draft_id = None
        return draft

    def draw(self, seed: int, is_new: IsNew) -> FrozenTrial | None:
        """Return a random new point, or None if no attempt gives one."""
        study = self._study(optuna.samplers.RandomSampler(seed=seed))
        return self._attempt(study, NUM_RANDOM_ATTEMPTS, is_new)[0]

    def fixed(self, params: dict[str, Any]) -> FrozenTrial:
        """Return the trial with just these values."""
        study = self._study()
        study.enqueue_trial(params)
        trial = study.ask()
        self._space.suggest(trial)
        return study.get_trials(deepcopy=False)[trial.number]

    def on_entered(self, trial: FrozenTrial) -> None:
        """Give the copy the journal's new trial, which may be the last draft or another one."""
        if self._copy is None:
            return
        if self._draft_id is None:
            self._add(as_unseen(trial))
        else:
            self._ids[trial.number], self._draft_id = self._draft_id, None
            if trial.state.is_finished():
                self.on_ended(trial)

    def on_ended(self, trial: FrozenTrial) -> None:
        """End the trial in the copy, as it has ended in the journal."""
        trial_id = self._ids.pop(trial.number, None)
        if self._copy is None or trial_id is None:
            return
        storage = self._copy._storage
        for step, value in trial.intermediate_values.items():
            storage.set_trial_intermediate_value(trial_id, step, value)
        for name, excess in trial.constraints.items():
            optuna.Trial(self._copy, trial_id).set_constraint(name, excess)
        storage.set_trial_state_values(trial_id, trial.state, trial.values)

    def _make_copy(self, trials: list[FrozenTrial], border: int) -> None:
        self._copy, self._ids, self._draft_id, self._border = self._study(), {}, None, border
        seen = as_seen(self._config, [as_unseen(trial) for trial in trials], self._num_objectives)
        for trial in (*thin_out(seen[:border], border), *seen[border:]) if border else seen:
            self._add(trial)

    def _add(self, trial: FrozenTrial) -> None:
        storage, study_id = self._copy._storage, self._copy._study_id
        if trial.state.is_finished():
            storage.create_new_trial(study_id, template_trial=_Ended(trial))
        else:
            self._ids[trial.number] = storage.create_new_trial(study_id, template_trial=trial)

    def _attempt(self, study: optuna.Study, num_attempts: int, is_new: IsNew) -> tuple[FrozenTrial | None, list[optuna.Trial]]:
        """Return the first new proposal, or None, and the trials rejected before it."""
        rejected = []
        for _ in range(num_attempts):
            trial = study.ask()
            if is_new(self._space.suggest(trial)):
                return study._storage.get_trial(trial._trial_id), rejected
            rejected.append(trial)
        return None, rejected

    def _study(self, sampler: optuna.samplers.BaseSampler | None = None) -> optuna.Study:
        return optuna.create_study(
            study_name=self._name,
            sampler=sampler or optuna.samplers.RandomSampler(),
            pruner=self._pruner,
            directions=["minimize"] * self._num_objectives,
        )


def as_unseen(trial: FrozenTrial) -> FrozenTrial:
    """Return a warm clone as one that failed: its place stays, and no sampler learns from it. Others are unchanged."""
    if warm_of(trial) is None:
        return trial
    unseen = optuna.trial.create_trial(state=TrialState.FAIL, params=trial.params, distributions=trial.distributions)
    unseen.number = trial.number
    return unseen


class _Ended(FrozenTrial):
    """Hold a trial that has ended, whose content a storage need not copy, since it never changes.

    A deep copy took 0.2 ms a trial. The copy of the study is made again now and then, during a
    decision.
    """

    def __init__(self, trial: FrozenTrial) -> None:
        super().__init__(
            number=trial.number,
            state=trial.state,
            value=None,
            values=trial.values,
            datetime_start=trial.datetime_start,
            datetime_complete=trial.datetime_complete,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs=trial.user_attrs,
            system_attrs=trial.system_attrs,
            intermediate_values=trial.intermediate_values,
            trial_id=trial._trial_id,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTrial:
        return copy.copy(self)


def thinned_before(number: int) -> int:
    """Return the trial before which the proposal for trial `number` sees only some; 0: all.

    The result depends on the number alone, so that a resumed sweep sees the same trials as an
    undisturbed one.
    """
    return 0 if number < MOST_SEEN else number - (number - MOST_SEEN) % (MOST_SEEN - FEWEST_SEEN)


def thin_out(trials: list[FrozenTrial], seed: int) -> list[FrozenTrial]:
    """Return the trials that TPE needs, in order: the running, the best, a fair share of others.

    TPE compares where the best 25 lie with where the others lie. A share of the others shows that
    well enough.
    """
    running = [trial for trial in trials if trial.state is TrialState.RUNNING]
    ranked = sorted(
        (trial for trial in trials if trial.state is TrialState.COMPLETE), key=lambda trial: (trial.values[0], trial.number)
    )
    # filters after the sort, because reading constraints costs more than sorting
    best = list(islice(filter(is_feasible, ranked), BEST_SEEN))
    taken = {trial.number for trial in (*running, *best)}
    wanted, rng = max(LEAST_SHARE, FEWEST_SEEN - len(best) - len(running)), random.Random(seed)
    drawn = [trials[i] for i in rng.sample(range(len(trials)), min(len(trials), DRAWN_AT_ONCE * wanted))]
    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    share = [trial for trial in drawn if trial.state in ended and trial.number not in taken][:wanted]
    return sorted((*running, *best, *share), key=lambda trial: trial.number)
