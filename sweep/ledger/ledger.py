"""The ledger: what the sweep knows while it runs. It stands between Ray's hooks and the study, and needs neither Ray nor a GPU.

Every event ends in the journal before anyone else hears of it; then the listeners (terminal, tracker) get the trial's record.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from types import MappingProxyType
from typing import Any, Protocol

from engine.errors import StorageError, first_line
from engine.system.files import storage_fault
from engine.trial_report import TrialReport
from sweep.folder.notes import is_training, was_terminated
from sweep.folder.sweep_folder import SweepFolder
from sweep.folder.timeline import Timeline
from sweep.ledger.budget import Budget
from sweep.ledger.limits import Limits
from sweep.ledger.live_trials import LiveTrials
from sweep.ledger.quota import Quota
from sweep.study.study import Study
from sweep.trials.objectives import objective_values
from sweep.trials.record import CONTENDERS, Outcome, Proposal, TrialRecord

MAX_INFEASIBLE_AT_ONCE = 20  # then Tune's loop has its turn: a plan takes a tenth of a second, and reports wait meanwhile
GOING_ON = (Outcome.RUNNING, Outcome.STOPPED)
NO_TIMING: Mapping[str, Any] = MappingProxyType({})


class Next(Enum):
    """What next_trial() answers when it has no trial to give."""

    WAIT = "all slots are taken, or a running trial may still have to be started again, or to be asked again at once"
    FINISHED = "the number of trials is reached, or the budget is spent, or nothing new that fits is found; and nothing runs"


class Listener(Protocol):
    """Hears of a trial after the journal has it."""

    def on_trial_updated(self, record: TrialRecord) -> None: ...


class Ledger:
    """Hands out trials, takes their reports and ends. Not thread-safe: the driver's one thread calls it."""

    def __init__(
        self,
        study: Study,
        folder: SweepFolder,
        limits: Limits,
        *,
        listeners: tuple[Listener, ...] = (),
        note: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """note: takes a line for the user about what is not a trial's state. monotonic: for the time between two reports."""
        self._study, self._folder, self._clock, self._listeners, self._note = study, folder, clock, listeners, note
        self._limits, self._timeline = limits, Timeline(folder.timeline)
        records = self.records
        self._records = {record.number: record for record in records if record.outcome in GOING_ON}
        self._budget = Budget(limits.budget, self._timeline, clock)
        for record in records:
            if record.score is not None and record.source is None and record.outcome in (*CONTENDERS, Outcome.RUNNING):
                self._budget.take_loss(record.score)
        own = [record for record in records if record.source is None]
        num_refused = sum(record.outcome is Outcome.INFEASIBLE for record in own)
        self._quota = Quota(limits.num_trials, self._budget, len(own) - num_refused, num_refused)
        self._waiting: list[int] = []
        self.live, self._is_winding_down = LiveTrials(limits.report_timeout_s, monotonic), False
        self.storage_fault: str | None = None  # why the sweep must stop and be resumed, in one line

    @property
    def records(self) -> list[TrialRecord]:
        """All trials so far, by number, from journal and folder: only those that may go on are kept in memory."""
        return [self._timed(record) for record in self._study.records()]

    @property
    def timeline(self) -> Timeline:
        return self._timeline

    @property
    def shortfall(self) -> str | None:
        """Why less was trained than asked for, in one line; None where that is not so, or not yet."""
        return self._quota.shortfall(sum(record.outcome is Outcome.STOPPED for record in self._records.values()))

    @contextmanager
    def on_disk(self) -> Iterator[None]:
        """Around every event: where the disk takes no more, the sweep stops; the journal is good to its last whole line."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, StorageError) and storage_fault(error) is None:
                raise
            self.suspend(f"{self._folder.path} cannot be written ({first_line(error)})")

    def suspend(self, reason: str) -> None:
        """The disk took no more: start nothing, end nothing. What runs is RUNNING in the journal and goes on at the resume."""
        self.storage_fault = self.storage_fault or reason

    def wind_down(self) -> None:
        """The driver will end: start nothing. What runs is asked to save and end, and goes on at the resume."""
        self._is_winding_down = True

    def num_training(self) -> int:
        """Live trials that may have something to save: an end waits for them."""
        return sum(is_training(self._folder.trial(number)) for number in self.live)

    def recover(self) -> list[int]:
        """After a kill: make up for what the driver did not hear. Returns the trials that will go on, with their numbers.

        Reports that are in a trial's folder but not in the study are reported; a trial whose reports are complete is told. The
        last verdict of the pruner may be what the kill took, so it is asked again. Files of a trial are written where they lack.
        """
        self._timeline.start_session(self._clock())
        for number in self._study.running():
            record = self._records[number]
            self._folder.write_train_config(number, self._study.config(number))
            for report in record.reports:
                self._study.report(number, report.rung, report.eval_loss)
            if record.reports and record.reports[-1].rung >= self._limits.num_rungs:
                self._end(number, Outcome.COMPLETE)
            elif self._study.should_prune(number):
                self._end(number, Outcome.PRUNED)
            else:
                self._waiting.append(number)
        self._stop_waiting_where_spent()
        for record in self.records:
            if record.source is not None:
                continue
            if record.outcome is not Outcome.RUNNING and not self._folder.has_result(record.number):
                self._folder.write_train_config(record.number, self._study.config(record.number))
                self._folder.write_result(record.number, record.result())
            self._tell_listeners(record)
        return list(self._waiting)

    def has_work(self) -> bool:
        """Whether any trial is left to run or may still be asked for."""
        return bool(self.live or self._waiting) or self._quota.may_ask

    def next_trial(self) -> Proposal | Next:
        """The next trial to start: one to go on with, else a new one."""
        if self.storage_fault or self._is_winding_down:
            return Next.WAIT
        self._stop_waiting_where_spent()
        if len(self.live) >= self._limits.num_slots:
            return Next.WAIT
        if self._waiting:
            number = self._waiting.pop(0)
            record = self._records[number]
            if record.outcome is Outcome.STOPPED:
                self._study.undo_stop(number)
            proposal = Proposal(number, record.params, self._study.config(number), num_heard=len(record.reports))
        else:
            proposal = self._ask()
        if proposal is None:
            return Next.WAIT if self.live or self._quota.may_ask else Next.FINISHED
        self.live.heard_of(proposal.number)
        self._timeline.on_assigned(proposal.number, self._clock())
        self._update(self._study.record(proposal.number))
        return proposal

    def reported(self, number: int, report: TrialReport, timing: Mapping[str, Any] = NO_TIMING) -> bool:
        """Take a report in. Returns True where the trial must stop; it is then told PRUNED, or noted as STOPPED, already.

        timing: slot, began_s and dead_time_s, see timeline.Span.
        """
        if number not in self.live or self.storage_fault:
            return True
        self.live.heard_of(number)
        self._timeline.on_reported(number, self._clock(), dict(timing))
        if self._take(number, report):
            self._update(self._records[number])
        if self._budget.spent():
            self._stop(number)
            return True
        if report.rung < self._limits.num_rungs and self._study.should_prune(number):
            self._end(number, Outcome.PRUNED)
            return True
        return False

    def ended(
        self,
        number: int,
        outcome: Outcome,
        report: TrialReport | None = None,
        error: str | None = None,
        memory: Mapping[str, float] | None = None,
        timing: Mapping[str, Any] = NO_TIMING,
    ) -> None:
        """A trial ended by itself; its last report, where it has one, arrives only here. memory: see Study.tell."""
        if number not in self.live or self.storage_fault:
            return
        self._timeline.on_reported(number, self._clock(), dict(timing))
        if report is not None:
            self._take(number, report)
        self._end(number, outcome, error, memory)

    def lost(self, number: int, reason: str = "its worker process died") -> None:
        """The trial's process is gone. It goes on from its own checkpoint, a limited number of times without a new report in
        between; then it is LOST, for the last reason.

        StorageError where the disk is full: Tune loses trials over its own files then, which is not theirs to pay for.
        """
        if number not in self.live or self.storage_fault:
            return
        self._folder.check_room()
        if was_terminated(self._folder.trial(number)):
            self._note(f"trial {number:3d}  its worker process was asked to end (SIGTERM); it goes on from where it was")
            self.released(number)
            return
        self._leave_slot(number)
        deaths = self._study.count_death(number)
        if deaths > self._limits.max_retries:
            times = "once" if deaths == 1 else f"{deaths} times in a row without a new report"
            self._end(number, Outcome.LOST, f"lost {times}; the last time, {reason}")
        else:
            self._note(f"trial {number:3d}  {reason}; it goes on from its checkpoint (see driver.log)")
            self._waiting.append(number)

    def released(self, number: int) -> None:
        """The trial was asked to end, has saved between two reports and left its slot: no death, it goes on from there."""
        if number in self.live:
            self._leave_slot(number)
            self._waiting.append(number)

    def _take(self, number: int, report: TrialReport) -> bool:
        """Put a report into the journal and the record; returns whether it was new."""
        is_new = self._study.report(number, report.rung, report.eval_loss)
        if is_new:
            record = self._records[number]
            seen = [old for old in record.reports if old.rung < report.rung]
            self._records[number] = self._timed(replace(record, reports=[*seen, report]))
            self._budget.take_loss(report.eval_loss)
        return is_new

    def _stop(self, number: int) -> None:
        """The budget is spent: end the trial where it is, so that a resume can go on with it."""
        now_s = self._clock()
        self._leave_slot(number)
        self._study.stop(number, now_s)
        self._close(self._timed(replace(self._records[number], outcome=Outcome.STOPPED, ended_s=now_s)))

    def _stop_waiting_where_spent(self) -> None:
        if self._waiting and self._budget.spent():
            for number in self._waiting:
                if self._records[number].outcome is not Outcome.STOPPED:
                    self._stop(number)
            self._waiting.clear()

    def _leave_slot(self, number: int) -> None:
        if self.live.remove(number):
            self._timeline.on_ended(number, self._clock(), {})

    def _timed(self, record: TrialRecord) -> TrialRecord:
        span = self._timeline.span(record.number)
        return record if span is None else replace(record, slot=span.slot, dead_time_s=span.dead_time_s)

    def _ask(self) -> Proposal | None:
        """The next proposal that fits; those before it are recorded and cost nothing."""
        for _ in range(MAX_INFEASIBLE_AT_ONCE):
            proposal = self._study.ask() if self._quota.may_ask else None
            if proposal is None:
                self._quota.is_used_up |= self._quota.may_ask
                return None
            if proposal.refusal is None:
                self._quota.num_started += 1
                return proposal
            self._quota.num_refused += 1
            self._close(self._study.record(proposal.number))
        return None

    def _end(self, number: int, outcome: Outcome, error: str | None = None, memory: Mapping[str, float] | None = None) -> None:
        self._leave_slot(number)
        values = objective_values(self._records[number], self._limits.objectives) if outcome is Outcome.COMPLETE else None
        if outcome is Outcome.COMPLETE and values is None:
            outcome, error = Outcome.FAILED, f"not measured: one of {', '.join(self._limits.objectives)}"
        self._study.tell(number, outcome, error, memory, values)
        ended_s = self._study.record(number).ended_s or self._clock()  # the journal's, which a resume will read
        changes = {"outcome": outcome, "ended_s": ended_s, "error": error, **(memory or {})}
        self._close(self._timed(replace(self._records[number], **changes)))

    def _close(self, record: TrialRecord) -> None:
        """Write and pass on what became of a trial, once the journal has it."""
        self._folder.write_result(record.number, record.result())
        self._update(record)
        if record.outcome not in GOING_ON:
            del self._records[record.number]

    def _update(self, record: TrialRecord) -> None:
        self._records[record.number] = record
        self._tell_listeners(record)

    def _tell_listeners(self, record: TrialRecord) -> None:
        for listener in self._listeners:
            listener.on_trial_updated(record)
