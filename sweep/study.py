"""The study: one Optuna study in a journal file, asked for trials and told how they end. Optuna enters here and in samplers.py.

A proposal is made in memory, on a copy of the study, and enters the journal in one record once it is known to be new: the default
TPE sampler repeats itself (30 % of trials in an 80-point space with 8 in flight), and a trial in the journal stays there.
A proposal that does not fit the card enters it as PRUNED with a violated constraint: that is what TPE learns from, and a failed
trial is not. Steps in the journal are rungs, from 1. The driver is the only writer.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from engine.config import TrainConfig, to_json
from engine.errors import InputError, first_line
from sweep.config import SweepConfig
from sweep.feasibility import UNPREDICTED, Verdict
from sweep.outcome import Outcome, Proposal, TrialRecord
from sweep.runs import SweepFolder
from sweep.samplers import MEMORY, as_seen, make_pruner, make_sampler
from sweep.space import Space

STUDY_NAME = "sweep"
NUM_SAMPLER_ATTEMPTS = 20  # then random draws: a sampler that insists on a known point has nothing new to say
NUM_RANDOM_ATTEMPTS = 200
MET_EXCESS_GIB = 1.0  # memory that ran out says that there was too little, not by how much
TOLD_PRUNED = (Outcome.PRUNED, Outcome.OUT_OF_MEMORY)  # the second with a violated constraint, so that the sampler learns it
Judge = Callable[[TrainConfig], Verdict]


class Study:
    """Ask, report, judge, tell; every change is in the journal when the method returns."""

    def __init__(self, folder: SweepFolder, config: SweepConfig, space: Space, judge: Judge = lambda config: UNPREDICTED) -> None:
        """Opens the journal in the folder, or starts one. The caller holds the folder's lock. judge: whether a config fits."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Constraints have been set")  # CMA-ES, which does not use them
        self._folder, self._space, self._seed, self._judge = folder, space, config.sweep.seed, judge
        self._base = config.base().model_dump(mode="json")
        _mend_journal(folder)
        self._pruner = make_pruner(config.pruner, len(config.train.report_grid()))
        self._study = self._open()
        # the seed moves on with the trials, so that a resumed sweep does not propose its beginning again
        self._sampler = make_sampler(config.sampler, config.sweep.seed + len(self._trials()))
        self._study.sampler = self._sampler
        self._sampler_config = config.sampler
        self._points = space.shuffled_points(config.sweep.seed)
        self._tried = {_key(self._config(trial.params), _is_refused(trial)) for trial in self._trials()}

    def _open(self) -> optuna.Study:
        try:
            self._storage = optuna.storages.JournalStorage(JournalFileBackend(str(self._folder.journal)))
            return optuna.create_study(storage=self._storage, study_name=STUDY_NAME, pruner=self._pruner, load_if_exists=True)
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError, optuna.exceptions.OptunaError) as error:
            raise InputError("resume", str(self._folder.journal), f"is no journal of a sweep ({first_line(error)})") from None

    def __len__(self) -> int:
        """Number of trials asked for so far, however they ended."""
        return len(self._trials())

    def ask(self) -> Proposal | None:
        """A new trial that trains an adapter no earlier one did, in the journal as RUNNING, or as ended where it does not fit;
        None where the space is used up."""
        draft = None if self._sampler_config.name == "grid" else self._draft()
        if draft is None:
            draft = self._unseen_point()
        if draft is None:
            return None
        config = self._config(draft.params)
        verdict = self._judge(config)
        self._study.add_trial(_entry(draft, verdict))
        self._tried.add(_key(config, not verdict.fits))
        number = self._trials()[-1].number
        self._folder.write_train_config(number, config)
        return Proposal(number, dict(draft.params), config, verdict.reason)

    def report(self, number: int, rung: int, eval_loss: float) -> bool:
        """Record a rung once. Returns whether it was new; a re-reported rung changes nothing."""
        trial = self._trial(number)
        if rung in trial.intermediate_values or trial.state.is_finished():
            return False
        self._storage.set_trial_intermediate_value(trial._trial_id, rung, eval_loss)
        return True

    def should_prune(self, number: int) -> bool:
        """The pruner's verdict on the last reported rung."""
        trial = self._trial(number)
        return bool(trial.intermediate_values) and bool(self._pruner.prune(self._study, trial))

    def tell(self, number: int, outcome: Outcome, error: str | None = None, memory: Mapping[str, float] | None = None) -> bool:
        """End a trial. Returns False, and changes nothing, where it has ended already.

        memory: predicted_gib and measured_gib, as far as known, where it ran out.
        """
        trial = self._trial(number)
        if trial.state.is_finished():
            return False
        # attributes first: a finished trial takes none, and a kill in between leaves a RUNNING trial that resume tells again
        self._storage.set_trial_user_attr(trial._trial_id, "outcome", str(outcome))
        known = {**({} if error is None else {"error": error}), **(memory or {})}
        for name, value in known.items():
            self._storage.set_trial_user_attr(trial._trial_id, name, value)
        if outcome is Outcome.OUT_OF_MEMORY:
            optuna.Trial(self._study, trial._trial_id).set_constraint(MEMORY, MET_EXCESS_GIB)
        told = TrialState.PRUNED if outcome in TOLD_PRUNED else TrialState.FAIL
        state = TrialState.COMPLETE if outcome is Outcome.COMPLETE else told
        value = min(trial.intermediate_values.values()) if outcome is Outcome.COMPLETE else None
        self._study.tell(number, value, state)
        return True

    def running(self) -> list[int]:
        """Numbers of trials that have not ended."""
        return [trial.number for trial in self._trials() if not trial.state.is_finished()]

    def records(self) -> list[TrialRecord]:
        """Every trial, from the journal and its folder."""
        return [self._record(trial) for trial in self._trials()]

    def record(self, number: int) -> TrialRecord:
        return self._record(self._trial(number))

    def config(self, number: int) -> TrainConfig:
        """The trial's whole config, made again from its params."""
        return self._config(self._trial(number).params)

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        finished = trial.state.is_finished()
        return TrialRecord(
            number=trial.number,
            params=dict(trial.params),
            config=self._config(trial.params).model_dump(mode="json"),
            outcome=Outcome(trial.user_attrs["outcome"]) if finished else Outcome.RUNNING,
            folder=str(self._folder.trial(trial.number)),
            reports=self._folder.reports(trial.number),
            started_s=trial.datetime_start.timestamp() if trial.datetime_start else None,
            ended_s=trial.datetime_complete.timestamp() if trial.datetime_complete else None,
            error=trial.user_attrs.get("error") if finished else None,
            predicted_gib=trial.user_attrs.get("predicted_gib"),
            measured_gib=trial.user_attrs.get("measured_gib"),
        )

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _trial(self, number: int) -> FrozenTrial:
        return self._trials()[number]

    def _config(self, params: dict[str, Any]) -> TrainConfig:
        return self._space.apply(self._base, params)

    def _is_new(self, params: dict[str, Any]) -> bool:
        config = self._config(params)
        return self._tried.isdisjoint({_key(config, False), _key(config, True)})

    def _draft(self) -> FrozenTrial | None:
        """What the sampler proposes, if it proposes something new within a number of attempts.

        The copy bears the study's name and pruner, because Hyperband picks a trial's bracket from them. Rejected proposals stay
        in the copy as running trials, which pushes a constant-liar sampler away from them.
        """
        copy = optuna.create_study(study_name=STUDY_NAME, sampler=self._sampler, pruner=self._pruner)
        copy.add_trials(as_seen(self._sampler_config, self._trials()))
        for _ in range(NUM_SAMPLER_ATTEMPTS):
            trial = copy.ask()
            if self._is_new(self._space.suggest(trial)):
                return copy.get_trials(deepcopy=False)[trial.number]
        return None

    def _unseen_point(self) -> FrozenTrial | None:
        """A point nobody tried: the next one of an enumerable space, else a random draw."""
        if self._points is not None:
            params = next((point for point in self._points if self._is_new(point)), None)
            return None if params is None else self._fixed(params)
        sampler = optuna.samplers.RandomSampler(seed=self._seed + len(self))
        copy = optuna.create_study(study_name=STUDY_NAME, sampler=sampler)
        for _ in range(NUM_RANDOM_ATTEMPTS):
            trial = copy.ask()
            if self._is_new(self._space.suggest(trial)):
                return copy.get_trials(deepcopy=False)[trial.number]
        return None

    def _fixed(self, params: dict[str, Any]) -> FrozenTrial:
        copy = optuna.create_study(study_name=STUDY_NAME)
        copy.enqueue_trial(params)
        trial = copy.ask()
        self._space.suggest(trial)
        return copy.get_trials(deepcopy=False)[trial.number]


def _key(config: TrainConfig, refused: bool) -> str:
    """What makes a config known. One that did not fit stands for itself alone: with another micro-batch it may fit."""
    return to_json(config) if refused else config.fingerprint()


def _is_refused(trial: FrozenTrial) -> bool:
    return trial.user_attrs.get("outcome") == Outcome.INFEASIBLE


def _entry(draft: FrozenTrial, verdict: Verdict) -> FrozenTrial:
    """The draft as it enters the journal, in one record: a kill leaves it whole or not at all."""
    attributes = {"predicted_gib": verdict.predicted_peak_gib} if verdict.predicted_peak_gib is not None else {}
    if not verdict.fits:
        attributes |= {"outcome": str(Outcome.INFEASIBLE), "error": verdict.reason}
    return optuna.trial.create_trial(
        state=TrialState.RUNNING if verdict.fits else TrialState.PRUNED,
        params=draft.params,
        distributions=draft.distributions,
        user_attrs=attributes,
        system_attrs=draft.system_attrs,  # the state of CMA-ES
        constraints=None if verdict.excess_gib is None else {MEMORY: verdict.excess_gib},
    )


def _mend_journal(folder: SweepFolder) -> None:
    """After a kill: drop a last line that was not written whole, and the lock that Optuna would wait 30 s for.

    The next record would be appended to the torn line and make the journal unreadable.
    """
    folder.journal.with_name(folder.journal.name + ".lock").unlink(missing_ok=True)
    if folder.journal.exists():
        with open(folder.journal, "r+b") as file:
            text = file.read()
            whole = text.rfind(b"\n") + 1
            if whole < len(text):
                file.truncate(whole)
        for number, line in enumerate(text[:whole].splitlines(), 1):
            _check_line(folder, number, line)


def _check_line(folder: SweepFolder, number: int, line: bytes) -> None:
    """A damaged line in the middle would hide every trial after it."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict) or not isinstance(entry.get("op_code"), int):
        raise InputError(str(folder.journal), line[:80], f"line {number} is damaged; restore the file from a copy")
