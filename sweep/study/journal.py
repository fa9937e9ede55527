"""Keep the journal, which is Optuna's log file in the sweep folder, and define its entries."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from engine.errors import InputError, first_line
from engine.trial_report import TrialReport
from sweep.folder.sweep_folder import SweepFolder
from sweep.study.journal_file import JournalFile
from sweep.study.samplers import MEMORY, known_constraints
from sweep.trials.record import Outcome, TrialRecord
from sweep.trials.warm_from import WarmFrom

if TYPE_CHECKING:  # a reader of the journal plans nothing
    from sweep.plan.feasibility import Fit
    from sweep.study.warm_start import EarlierTrial

STUDY_NAME = "sweep"
# prefix of the notes that successive halving keeps of a trial and reads of the others
JUDGED = "completed_rung_"
# OUT_OF_MEMORY also violates the constraint, so that the sampler learns from it; a PAUSED trial ends
# only where a later sweep takes it over
TOLD_PRUNED = (Outcome.PRUNED, Outcome.OUT_OF_MEMORY, Outcome.PAUSED)
# what Optuna raises for a file that is no journal of a sweep
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, AssertionError, optuna.exceptions.OptunaError)
WARM = "warm"  # user attribute of a warm clone
# noted of a trial that Optuna counts as running: it may go on
WAITING = (Outcome.STOPPED, Outcome.PAUSED)
ConfigOf = Callable[[dict[str, Any]], dict[str, Any]]


def open_journal(folder: SweepFolder) -> optuna.storages.JournalStorage:
    """Open the storage on the folder's journal for its one writer. Creates a missing file."""
    return optuna.storages.JournalStorage(JournalFile(folder.journal))


def open_study(
    folder: SweepFolder, pruner: optuna.pruners.BasePruner, num_objectives: int
) -> tuple[optuna.storages.JournalStorage, optuna.Study]:
    """Open the study in the folder's journal for its one writer, or begin it. Raises InputError for a damaged journal."""
    directions = ["minimize"] * num_objectives
    try:
        storage = open_journal(folder)
        study = optuna.create_study(
            storage=storage, study_name=STUDY_NAME, pruner=pruner, directions=directions, load_if_exists=True
        )
    except DAMAGED as error:
        raise InputError("resume", str(folder.journal), f"must be the journal of a sweep ({first_line(error)})") from None
    return storage, study


def read_trials(folder: SweepFolder) -> list[FrozenTrial]:
    """Return every trial of another sweep, which may be running, without changing anything.

    Empty if the sweep has not begun. Raises InputError for a damaged journal.
    """
    if not folder.journal.is_file() or folder.journal.stat().st_size == 0:
        return []
    try:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder.journal)))
        return optuna.load_study(study_name=STUDY_NAME, storage=storage).get_trials(deepcopy=False)
    except DAMAGED as error:
        raise damaged_journal(folder, error) from None


def damaged_journal(folder: SweepFolder, error: Exception) -> InputError:
    """Return what to raise for one of DAMAGED."""
    return InputError("folder", str(folder.path), f"has a damaged journal ({first_line(error)}); restore it from a copy")


class FollowedJournal:
    """Read the journal of a sweep that may be running, and later only what was added to it."""

    def __init__(self, folder: SweepFolder) -> None:
        self._folder = folder
        self._study: optuna.Study | None = None

    def trials(self) -> list[FrozenTrial]:
        """Return every trial; those that did not change are the same objects as in the last call.

        Empty if the sweep has not begun. Raises one of DAMAGED for a damaged journal.
        """
        journal = self._folder.journal
        if not journal.is_file() or journal.stat().st_size == 0:
            return []
        if self._study is None:
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
            if not storage.get_all_studies():  # its first record is being written
                return []
            self._study = optuna.load_study(study_name=STUDY_NAME, storage=storage)
        return self._study.get_trials(deepcopy=False)

    def attributes(self) -> dict[str, Any]:
        """Return the study's own attributes as of the last look at its trials: commands change them."""
        return {} if self._study is None else self._study.user_attrs


def read_attributes(folder: SweepFolder) -> dict[str, Any]:
    """Return the study's own attributes. Empty if the sweep has not begun, or its journal is damaged.

    Who opens a damaged journal is told so by `mend_journal`.
    """
    if not folder.journal.is_file() or folder.journal.stat().st_size == 0:
        return {}
    try:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder.journal)))
        return optuna.load_study(study_name=STUDY_NAME, storage=storage).user_attrs
    except DAMAGED:
        return {}


def read_records(folder: SweepFolder, config_of: ConfigOf) -> tuple[list[FrozenTrial], list[TrialRecord]]:
    """Return every trial of another sweep, and the plain record of each.

    The records include the reports from the trials' folders. config_of: as for record_of. Raises
    InputError for a damaged journal.
    """
    trials = read_trials(folder)
    try:
        return trials, [record_of(trial, folder, config_of) for trial in trials]
    except DAMAGED as error:
        raise damaged_journal(folder, error) from None


def mend_journal(folder: SweepFolder) -> None:
    """Repair the journal after a kill: drop a torn last line, and Optuna's lock.

    The next record would be appended to the torn line and make the journal unreadable. Optuna would
    wait 30 s for the lock. Raises InputError for any other damaged line.
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
    """Raise InputError for a damaged line, which would hide every trial after it."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict) or not isinstance(entry.get("op_code"), int):
        raise InputError(str(folder.journal), line[:80], f"line {number} is damaged; restore the file from a copy")


def told_state(outcome: Outcome) -> TrialState:
    """Return the state that Optuna is told for a trial that has ended."""
    if outcome is Outcome.COMPLETE:
        return TrialState.COMPLETE
    return TrialState.PRUNED if outcome in TOLD_PRUNED else TrialState.FAIL


def new_entry(draft: FrozenTrial, fit: Fit, warm: WarmFrom | None = None) -> FrozenTrial:
    """Return the draft as it enters the journal. warm: what it begins with, if it is a warm clone.

    It enters in one record, so that a kill leaves it whole or not at all.
    """
    attributes = {"predicted_gib": fit.predicted_peak_gib, "excess_gib": fit.excess_gib, WARM: warm and warm.to_dict()}
    attributes = {name: value for name, value in attributes.items() if value is not None}
    if not fit.fits:
        attributes |= {"outcome": str(Outcome.INFEASIBLE), "error": fit.reason}
    return optuna.trial.create_trial(
        state=TrialState.RUNNING if fit.fits else TrialState.PRUNED,
        params=dict(draft.params),
        distributions=dict(draft.distributions),
        user_attrs=attributes,
        # the state of CMA-ES; a copy, because create_trial adds the constraint
        system_attrs=dict(draft.system_attrs),
        # a constraint can be set only once, and a trial that fits may still run out of memory:
        # Study.tell sets its constraint when it ends
        constraints=None if fit.fits else {MEMORY: fit.excess_gib},
    )


def warm_of(trial: FrozenTrial) -> WarmFrom | None:
    """Return what a warm clone began with; None for any other trial."""
    found = trial.user_attrs.get(WARM)
    return None if found is None else WarmFrom.from_dict(found)


def earlier_entry(
    draft: FrozenTrial, earlier: EarlierTrial, values: tuple[float, ...] | None, excess_gib: float | None
) -> FrozenTrial:
    """Return a trial of an earlier sweep as it enters the journal: ended, with its reports.

    values: one for each objective if the trial is COMPLETE, else None.
    """
    record = earlier.record
    attributes = {"outcome": str(record.outcome), "source": earlier.source, "error": record.error}
    return optuna.trial.create_trial(
        state=told_state(record.outcome),
        values=values,
        params=dict(draft.params),
        distributions=dict(draft.distributions),
        intermediate_values={report.rung: value for report in record.reports if (value := record.judged(report)) is not None},
        user_attrs={name: value for name, value in attributes.items() if value is not None},
        system_attrs=dict(earlier.rungs_judged),
        constraints=known_constraints(excess_gib, record.excess) or None,
    )


def record_of(trial: FrozenTrial, folder: SweepFolder, config_of: ConfigOf) -> TrialRecord:
    """Return the record of a trial, from the journal and the trial's folder.

    config_of: params -> the whole config as plain data.
    """
    finished, known = trial.state.is_finished(), trial.user_attrs
    # a kill within Study.tell leaves a running trial that already has another outcome
    unfinished = next((outcome for outcome in WAITING if known.get("outcome") == outcome), Outcome.RUNNING)
    reports = folder.reports(trial.number)
    started_s = trial.datetime_start.timestamp() if trial.datetime_start else None
    config, warm = config_of(trial.params), warm_of(trial)
    ended_s = trial.datetime_complete.timestamp() if trial.datetime_complete else known.get("stopped_s")
    return TrialRecord(
        number=trial.number,
        params=dict(trial.params),
        config=config if warm is None else warm.put_into(config, folder.start(trial.number)),
        outcome=Outcome(known["outcome"]) if finished else unfinished,
        folder=str(folder.trial(trial.number)),
        reports=reports,
        started_s=started_s,
        ended_s=_not_before(started_s, reports, ended_s),
        error=known.get("error") if finished else None,
        predicted_gib=known.get("predicted_gib"),
        measured_gib=known.get("measured_gib"),
        source=known.get("source"),
        warm=warm,
    )


def _not_before(started_s: float | None, reports: list[TrialReport], ended_s: float | None) -> float | None:
    """Return when a trial ended, not before its start and training allow.

    Someone may have set the clock back meanwhile. So does the end of summer time, because Optuna
    writes local times.
    """
    if started_s is None or ended_s is None:
        return ended_s
    return max(ended_s, started_s + (reports[-1].elapsed_s if reports and ended_s < started_s else 0.0))


def rungs_judged(trial: FrozenTrial) -> dict[str, Any]:
    """Return the notes that successive halving keeps of a trial."""
    return {name: value for name, value in trial.system_attrs.items() if name.startswith(JUDGED)}
