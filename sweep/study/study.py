"""Run one Optuna study in a journal file: ask it for trials, and tell it how they end.

A proposal is made in memory, on a copy of the study. It enters the journal in one record once it is
known to be new. The default TPE sampler repeats itself (30 % of trials in an 80-point space with 8
in flight), and the journal keeps every trial.

A proposal that does not fit the card enters as PRUNED with a violated constraint. TPE learns from
that, and not from a failed trial. Steps in the journal are rungs, from 1. The driver is the only
writer.

A proposal depends only on the seed, its number and the trials before it. A resumed sweep therefore
proposes what it would have proposed without the stop.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from sweep.config.sweep import SweepConfig
from sweep.curves.setup_price import KeptSetupPrice
from sweep.folder.sweep_folder import SweepFolder
from sweep.plan.feasibility import UNPREDICTED, Fit
from sweep.prior.kept_beginning import KeptBeginning
from sweep.space.space import Space
from sweep.study.begun_with import as_attributes, keep
from sweep.study.earlier_sweeps import EarlierSweeps
from sweep.study.journal import STUDY_NAME, earlier_entry, mend_journal, new_entry, open_study, record_of, told_state, warm_of
from sweep.study.kept_commands import KeptCommands
from sweep.study.known_configs import config_key, is_refused
from sweep.study.proposals import Proposer
from sweep.study.pruner_verdicts import Pruning
from sweep.study.pruners import make_optuna_pruner, make_pruner
from sweep.study.samplers import known_constraints, make_sampler, proposal_seed
from sweep.trials.objectives import objective_values
from sweep.trials.record import Outcome, Proposal, TrialRecord
from sweep.trials.warm_from import WarmFrom

TAKEN_OVER = "num_taken_over"
MET_EXCESS_GIB = 1.0  # assumed: a trial that ran out of memory does not tell how much it lacked
DEATHS = "deaths"  # user attribute: {"rung", "count"}
RANDOM_STREAM = 1  # seeds random draws, made once the sampler only repeats itself
FitCheck = Callable[[TrainConfig], Fit]


class Study:
    """Ask, report, judge and tell. Every change is in the journal when the method returns."""

    _open = staticmethod(open_study)  # replays keep the journal in memory

    def __init__(
        self, folder: SweepFolder, config: SweepConfig, space: Space, fit_check: FitCheck = lambda config: UNPREDICTED
    ) -> None:
        """Open the journal in the folder, or start one.

        The caller holds the folder's lock. fit_check: returns whether a config fits the card.
        Raises InputError for a damaged journal and for a sampler whose package is missing.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        # CMA-ES does not use them
        warnings.filterwarnings("ignore", message="Constraints have been set")
        self._folder, self._space, self._seed, self._fit_check = folder, space, config.sweep.seed, fit_check
        self._base = config.base().model_dump(mode="json")
        mend_journal(folder)
        num_rungs = len(config.train.report_grid())
        self._pruner = make_optuna_pruner(config.effective_pruner, num_rungs)
        self._objectives = config.sweep.objectives
        self._storage, self._study = self._open(folder, self._pruner, len(self._objectives))
        self.beginning, self.commands = KeptBeginning(self._study), KeptCommands(self._study)
        self.setup_price = KeptSetupPrice(self._study)
        make_sampler(config.sampler, 0)  # fails now if its package is missing
        self._pruning = Pruning(make_pruner(config.effective_pruner, num_rungs, STUDY_NAME), num_rungs, self._trials())
        self._proposer = Proposer(STUDY_NAME, config.sampler, config.sweep.seed, self._pruner, space, len(self._objectives))
        self._is_grid = config.sampler.name == "grid"
        self._points = space.shuffled_points(config.sweep.seed)
        self._next_point, self._num_trials = 0, len(self._trials())
        # keeps each distribution once, because the journal makes new ones for every trial
        self._distributions: dict[tuple[str, Any], Any] = {}
        for trial in self._trials():
            self._share_distributions(trial)
        self._tried = {config_key(self._config_of(trial), is_refused(trial)) for trial in self._trials()}

    def ask(self, chosen: Mapping[str, Any] | None = None, warm: WarmFrom | None = None) -> Proposal | None:
        """Enter a new trial in the journal, which trains an adapter that no earlier trial did.

        It enters as RUNNING, or as ended if it does not fit. Returns None if the space is used up.
        chosen: the untried point to enter; None: the earlier sweeps' points, then the sampler's. warm:
        the adapter that it begins with. Neither sampler nor pruner learns from such a trial.
        """
        point = self.next_first_point() if chosen is None else dict(chosen)
        draft = None if point is None else self._proposer.fixed(point)
        if draft is None and not self._is_grid:
            draft = self._proposer.propose(self._num_trials, self._trials, self.is_new)
        if draft is None:
            draft = self._unseen_point()
        if draft is None:
            return None
        config = self._config(draft.params, warm)
        fit = self._fit_check(config)
        number = self._enter(new_entry(draft, fit, warm))
        self._tried.add(config_key(config, not fit.fits))
        self._folder.write_train_config(number, config)
        return Proposal(number, dict(draft.params), config, fit.reason)

    def keep_begun_with(self, config: SweepConfig, inputs: Mapping[str, str]) -> bool:
        """Keep in the journal what the sweep began with, and what a resume changed.

        Returns False if trials are there from a version that kept nothing.
        """
        return keep(self._study, as_attributes(config, inputs, len(self.commands.taken))) or not self._num_trials

    @property
    def has_earlier_trials(self) -> bool:
        """Return whether take_over() has finished, in this session or an earlier one."""
        return TAKEN_OVER in self._study.user_attrs

    def take_over(self, found: EarlierSweeps) -> None:
        """Enter trials of earlier sweeps in the journal as ended, each once.

        The sampler learns from them, and none is trained again.
        """
        known = {trial.user_attrs.get("source") for trial in self._trials()}
        for earlier in found.trials:
            if earlier.source in known:
                continue
            config, record = self._config(earlier.params), earlier.record
            values = objective_values(record, self._objectives) if record.outcome is Outcome.COMPLETE else None
            draft, excess_gib = self._proposer.fixed(earlier.params), self._fit_check(config).excess_gib
            number = self._enter(earlier_entry(draft, earlier, values, excess_gib))
            self._tried.add(config_key(config, False))
            self._folder.write_train_config(number, config)
            self._folder.write_reports(number, record.reports)
        self._study.set_user_attr(TAKEN_OVER, len(found.trials))

    def report(self, number: int, rung: int, value: float) -> bool:
        """Record a rung once. Returns whether it was new. value: what the pruner compares, smaller is better."""
        trial = self._trial(number)
        if rung in trial.intermediate_values or trial.state.is_finished():
            return False
        self._storage.set_trial_intermediate_value(trial._trial_id, rung, value)
        self._pruning.on_reported(number, rung, value)
        return True

    def should_prune(self, number: int) -> bool:
        """Return the pruner's verdict on the last reported rung. Ask once a rung."""
        return self._pruning.should_prune(number)

    def count_death(self, number: int) -> int:
        """Count one more death of the trial's process. Returns how many since its last new report.

        The count is in the journal, so that a trial that takes the driver down with it is not tried
        forever.
        """
        trial = self._trial(number)
        rung = max(trial.intermediate_values, default=0)
        last = trial.user_attrs.get(DEATHS, {"rung": rung, "count": 0})
        count = 1 + (last["count"] if last["rung"] == rung else 0)
        self._storage.set_trial_user_attr(trial._trial_id, DEATHS, {"rung": rung, "count": count})
        return count

    def tell(
        self,
        number: int,
        outcome: Outcome,
        error: str | None = None,
        memory: Mapping[str, float] | None = None,
        values: Sequence[float] | None = None,
        excess: float | None = None,
    ) -> bool:
        """End a trial. Returns False, and changes nothing, if it has already ended.

        memory: predicted_gib and measured_gib, as far as known, if memory ran out. values: one for each objective
        of a COMPLETE trial; None: the lowest reported eval_loss. excess: see TrialRecord.
        """
        trial = self._trial(number)
        if trial.state.is_finished():
            return False
        # attributes come first, because a finished trial takes none; a kill in between leaves a
        # RUNNING trial, which resume tells again
        self._storage.set_trial_user_attr(trial._trial_id, "outcome", str(outcome))
        known = {**({} if error is None else {"error": error}), **(memory or {})}
        for name, value in known.items():
            self._storage.set_trial_user_attr(trial._trial_id, name, value)
        excess_gib = MET_EXCESS_GIB if outcome is Outcome.OUT_OF_MEMORY else trial.user_attrs.get("excess_gib")
        for name, value in known_constraints(excess_gib, excess).items():
            optuna.Trial(self._study, trial._trial_id).set_constraint(name, value)
        if outcome is Outcome.COMPLETE and values is None:
            values = [min(trial.intermediate_values.values())]
        self._study.tell(number, values if outcome is Outcome.COMPLETE else None, told_state(outcome))
        ended = self._trial(number)
        self._proposer.on_ended(ended)
        self._pruning.on_ended(ended)
        return True

    def stop(self, number: int, outcome: Outcome = Outcome.STOPPED) -> float | None:
        """Note that the trial waits: STOPPED or PAUSED. Returns when it stopped, as a resume reads it.

        To Optuna it stays running, because a trial that has ended can never continue.
        """
        self._note_stop(number, outcome, time.time())  # the clock of Optuna's own times
        return self.record(number).ended_s

    def undo_stop(self, number: int) -> None:
        """Take back a stop(). The trial's result goes first: after a kill only the journal says how it stands."""
        self._folder.drop_result(number)
        self._note_stop(number, Outcome.RUNNING, None)

    def running(self) -> list[int]:
        """Return the numbers of trials that have not ended."""
        return [trial.number for trial in self._trials() if not trial.state.is_finished()]

    def records(self) -> list[TrialRecord]:
        """Return the record of every trial, from the journal and its folder."""
        return [self._record(trial) for trial in self._trials()]

    def record(self, number: int) -> TrialRecord:
        return self._record(self._trial(number))

    def config(self, number: int) -> TrainConfig:
        """Return the trial's whole config, made again from its params."""
        return self._config_of(self._trial(number))

    def _note_stop(self, number: int, outcome: Outcome, now_s: float | None) -> None:
        trial_id = self._trial(number)._trial_id
        self._storage.set_trial_user_attr(trial_id, "stopped_s", now_s)
        self._storage.set_trial_user_attr(trial_id, "outcome", str(outcome))

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        return record_of(trial, self._folder, lambda params: self._space.merged(self._base, params))

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _trial(self, number: int) -> FrozenTrial:
        study_id = self._study._study_id
        return self._storage.get_trial(self._storage.get_trial_id_from_study_id_trial_number(study_id, number))

    def _enter(self, trial: FrozenTrial) -> int:
        """Add a trial to the journal. Returns its number."""
        self._study.add_trial(trial)
        entered = self._trial(self._num_trials)
        self._share_distributions(entered)
        self._num_trials += 1
        self._proposer.on_entered(entered)
        self._pruning.on_entered(entered)
        return entered.number

    def _share_distributions(self, trial: FrozenTrial) -> None:
        known = self._distributions
        trial.distributions = {name: known.setdefault((name, one), one) for name, one in trial.distributions.items()}

    def next_first_point(self) -> dict[str, Any] | None:
        """Return the next untried of the points to try first."""
        return self.beginning.next_point(self.is_new)

    def _unseen_point(self) -> FrozenTrial | None:
        """Return an untried point: the next one of an enumerable space, else a random draw."""
        if self._points is None:
            return self._proposer.draw(proposal_seed(self._seed, self._num_trials, RANDOM_STREAM), self.is_new)
        for number in range(self._next_point, len(self._points)):
            self._next_point = number + 1  # a known point stays known
            if self.is_new(self._points[number]):
                return self._proposer.fixed(self._points[number])
        return None

    def _config_of(self, trial: FrozenTrial) -> TrainConfig:
        return self._config(trial.params, warm_of(trial), trial.number)

    def _config(self, params: dict[str, Any], warm: WarmFrom | None = None, number: int | None = None) -> TrainConfig:
        """Return a trial's whole config. number: of the trial; None: the next one."""
        config = self._space.apply(self._base, params)
        if warm is None:
            return config
        start = self._folder.start(self._num_trials if number is None else number)
        return parse(TrainConfig, warm.put_into(config.model_dump(mode="json"), start))

    def is_new(self, params: dict[str, Any], warm: WarmFrom | None = None) -> bool:
        config = self._config(params, warm)
        return self._tried.isdisjoint({config_key(config, False), config_key(config, True)})
