"""Connect Ray's hooks with the study: hand out trials, take their reports and ends.

The journal gets each event first. Then the listeners (terminal, tracker) get the trial's record.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from engine.trial_report import TrialReport
from sweep.curves.situation import GoOn
from sweep.folder.litter import drop_if_ended
from sweep.folder.notes import was_terminated
from sweep.folder.steady_clock import SteadyClock
from sweep.folder.sweep_folder import SweepFolder
from sweep.folder.timeline import Timeline
from sweep.ledger.answers import Listener, Next
from sweep.ledger.budget import Budget
from sweep.ledger.freezer import Freezer
from sweep.ledger.halt import Halt
from sweep.ledger.limits import Limits
from sweep.ledger.live_trials import LiveTrials
from sweep.ledger.quota import Quota
from sweep.study.study import Study
from sweep.trials.objectives import objective_values
from sweep.trials.record import GOING_ON, Outcome, Proposal, TrialRecord

MAX_INFEASIBLE_AT_ONCE = 20  # reports wait meanwhile: planning one config takes a tenth of a second
NO_TIMING: Mapping[str, Any] = MappingProxyType({})


class Ledger(Halt):
    """Hand out trials, take their reports and ends. Only one thread, the driver's, may call it."""

    def __init__(
        self,
        study: Study,
        folder: SweepFolder,
        limits: Limits,
        *,
        freezer: Freezer | None = None,
        listeners: tuple[Listener, ...] = (),
        note: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """freezer: pauses trials; None: a pruner judges. note: shows a line. clock: Unix seconds. monotonic: for silence."""
        super().__init__(folder.path)
        self._study, self._folder, self._listeners, self._note, self._limits = study, folder, listeners, note, limits
        self._freezer = freezer
        self.clock, self.timeline = clock or SteadyClock(), Timeline(folder.timeline)
        records = self.records
        self._records = {record.number: record for record in records if record.outcome in GOING_ON and record.source is None}
        self._budget = Budget(limits, self.timeline, self.clock)
        self._budget.take_earlier(records)
        self._quota = Quota.begun(limits.num_trials, self._budget, records)
        if freezer is not None:
            freezer.begin(self._quota, records)
        self._waiting: list[int] = []
        self.live = LiveTrials(limits.report_timeout_s, monotonic)

    @property
    def records(self) -> list[TrialRecord]:
        """Read all trials by number, from journal and folder: memory holds unfinished ones only."""
        return [self._timed(record) for record in self._study.records()]

    @property
    def shortfall(self) -> str | None:
        """Return in one line why fewer trials ran than asked for, or None. See Quota.shortfall."""
        return self._quota.shortfall(Counter(record.outcome for record in self._records.values()))

    def recover(self) -> list[int]:
        """Catch up after a kill. Returns the numbers of the trials that will continue.

        The study gets reports that only a trial's folder has, and the ends of trials with all of
        theirs. Pruner or freezer decide again, as the kill may have lost their decision.
        """
        self.timeline.start_session(self.clock(), self._limits.num_slots)
        for number in self._study.running():
            record = self._records[number]
            self._folder.write_train_config(number, self._study.config(number))
            for report in record.reports:
                self._study.report(number, report.rung, record.judged(report))
            if record.reports and record.reports[-1].rung >= self._limits.num_rungs:
                self._end(number, Outcome.COMPLETE)
            elif record.outcome is not Outcome.PAUSED and self._keeps_slot(number):
                self._queue(number)
        self._stop_waiting_where_spent()
        for record in (record for record in self.records if record.source is None):
            if record.outcome is not Outcome.RUNNING and not self._folder.has_result(record.number):
                self._folder.write_train_config(record.number, self._study.config(record.number))
                self._folder.write_result(record.number, record.result())
            drop_if_ended(record)  # a kill may have kept its checkpoints
            self._tell_listeners(record)
        return list(self._waiting)

    def has_work(self) -> bool:
        """Return whether any trial is left to run or may still be asked for."""
        return bool(self.live or self._waiting) or self._may_find_more

    @property
    def is_running_out(self) -> bool:
        """Return whether the live trials are the last. False where a freezer decides: asking it costs time."""
        return bool(self.live) and not self._waiting and self._freezer is None and not self._quota.may_ask

    def next_trial(self) -> Proposal | Next:
        """Return the next trial to start: one to continue, else a new one."""
        if self.storage_fault or self.is_winding_down:
            return Next.WAIT
        self._stop_waiting_where_spent()
        if len(self.live) >= self._limits.num_slots:
            return Next.WAIT
        if self._waiting:
            proposal = self._continued(self._waiting.pop(0))
        else:
            proposal = self._ask()
        if proposal is None:
            return Next.WAIT if self.live or self._may_find_more else Next.FINISHED
        self.live.heard_of(proposal.number)
        self.timeline.on_assigned(proposal.number, self.clock())
        self._update(self._study.record(proposal.number))
        return proposal

    def reported(self, number: int, report: TrialReport, timing: Mapping[str, Any] = NO_TIMING) -> bool:
        """Take a report. Returns True if the trial must stop: it is PRUNED, PAUSED or STOPPED by then.

        timing: slot, began_s, dead_time_s and parts, see timeline.Span.
        """
        if number not in self.live or self.storage_fault:
            return True
        self.live.heard_of(number)
        self.timeline.on_reported(number, self.clock(), dict(timing))
        if self._take(number, report):
            self._update(self._records[number])
        if self._budget.spent():
            self._stop(number)
            return True
        return report.rung < self._limits.num_rungs and not self._keeps_slot(number)

    def ended(
        self,
        number: int,
        outcome: Outcome,
        report: TrialReport | None = None,
        error: str | None = None,
        memory: Mapping[str, float] | None = None,
        timing: Mapping[str, Any] = NO_TIMING,
    ) -> None:
        """Take the end of a trial, with its last report if there is one. memory: see Study.tell."""
        if number not in self.live or self.storage_fault:
            return
        self.timeline.on_reported(number, self.clock(), dict(timing))
        if report is not None:
            self._take(number, report)
        self._end(number, outcome, error, memory)

    def lost(self, number: int, reason: str = "its worker process died") -> None:
        """Queue a trial again after its process died, or end it as LOST beyond max_retries.

        A new report resets the count. StorageError: the disk is full, so Tune lost the trial.
        """
        if number not in self.live or self.storage_fault:
            return
        self._folder.check_room()
        if was_terminated(self._folder.trial(number)):
            self._note(f"trial {number:3d}  its worker process got SIGTERM; the trial continues from where it was")
            self.released(number)
            return
        self._leave_slot(number)
        deaths = self._study.count_death(number)
        if deaths > self._limits.max_retries:
            times = "once" if deaths == 1 else f"{deaths} times in a row without a new report"
            self._end(number, Outcome.LOST, f"lost {times}; the last time, {reason}")
        else:
            self._note(f"trial {number:3d}  {reason}; it continues from its checkpoint (see driver.log)")
            self._queue(number)

    def released(self, number: int, timing: Mapping[str, Any] = NO_TIMING) -> None:
        """Queue again a trial that was asked to end and has saved. This counts as no death."""
        if number in self.live:
            self._leave_slot(number, timing)
            self._queue(number)

    def _queue(self, number: int) -> None:
        """Let a trial without a slot wait for one."""
        self._waiting.append(number)

    def _is_protected(self, number: int) -> bool:
        """Return whether neither pruner nor freezer may take the trial's slot."""
        return False

    def _take(self, number: int, report: TrialReport) -> bool:
        """Put a report into the journal and the record. Returns whether it was new."""
        record = self._records[number]
        is_new = self._study.report(number, report.rung, record.judged(report))
        if is_new:
            seen = [old for old in record.reports if old.rung < report.rung]
            self._records[number] = self._timed(replace(record, reports=[*seen, report]))
            self._budget.take(self._records[number], seen[-1].rung if seen else 0)
        return is_new

    def _keeps_slot(self, number: int) -> bool:
        """Judge a trial at its newest rung. It is PRUNED or PAUSED if it leaves its slot; a spent budget has it STOPPED."""
        keeps, is_spent = self._is_protected(number), self._budget.spent()
        if self._freezer is None:
            if not is_spent and self._study.should_prune(number) and not (keeps or self._records[number].is_unjudged):
                self._end(number, Outcome.PRUNED)
                return False
        elif not keeps and not is_spent and self._records[number].reports and not self._freezer.goes_on(number):
            self._stop(number, Outcome.PAUSED)
            return False
        return True

    def _stop(self, number: int, outcome: Outcome = Outcome.STOPPED) -> None:
        """End a trial's stay because the budget is spent, or PAUSED. It can be continued."""
        self._leave_slot(number)
        ended_s = self._study.stop(number, outcome)
        self._close(self._timed(replace(self._records[number], outcome=outcome, ended_s=ended_s)))

    def _stop_waiting_where_spent(self) -> None:
        if self._waiting and self._budget.spent():
            for number in self._waiting:
                if self._records[number].outcome is not Outcome.STOPPED:
                    self._stop(number)
            self._waiting.clear()

    def _leave_slot(self, number: int, timing: Mapping[str, Any] = NO_TIMING) -> None:
        if self.live.remove(number):
            self.timeline.on_ended(number, self.clock(), dict(timing))

    def _timed(self, record: TrialRecord) -> TrialRecord:
        span = self.timeline.span(record.number)
        return record if span is None else replace(record, slot=span.slot, dead_time_s=span.dead_time_s)

    def _ask(self) -> Proposal | None:
        """Return the next proposal that fits, or the paused trial that the freezer prefers.

        Proposals before it, which do not fit, are recorded and cost nothing.
        """
        for _ in range(MAX_INFEASIBLE_AT_ONCE):
            decision = None if self._freezer is None else self._freezer.decide()
            if isinstance(decision, GoOn):
                return self._continued(decision.number)
            may_ask = self._quota.may_ask if self._freezer is None else decision is not None
            proposal = self._study.ask(None if decision is None else decision.params) if may_ask else None
            if proposal is None:
                self._quota.is_used_up |= may_ask
                return None
            if proposal.refusal is None:
                self._quota.num_started += 1
                return proposal
            self._quota.num_refused += 1
            self._close(self._study.record(proposal.number))
        return None

    @property
    def _may_find_more(self) -> bool:
        """Return whether next_trial() may return a trial though none waits."""
        return self._quota.may_ask if self._freezer is None else self._freezer.decide() is not None

    def _continued(self, number: int) -> Proposal:
        """Return the trial as it goes on from its checkpoint."""
        record = self._records[number]
        if record.outcome is not Outcome.RUNNING:
            self._study.undo_stop(number)
        return Proposal(number, record.params, self._study.config(number), num_heard=len(record.reports))

    def _end(self, number: int, outcome: Outcome, error: str | None = None, memory: Mapping[str, float] | None = None) -> None:
        self._leave_slot(number)
        values = objective_values(self._records[number], self._limits.objectives) if outcome is Outcome.COMPLETE else None
        if outcome is Outcome.COMPLETE and values is None:
            why = self._records[number].reports[-1].metrics_error
            outcome, error = Outcome.FAILED, why or f"not measured: one of {', '.join(self._limits.objectives)}"
        self._study.tell(number, outcome, error, memory, values, self._records[number].excess)
        ended_s = self._study.record(number).ended_s or self.clock()  # as a resume reads it
        changes = {"outcome": outcome, "ended_s": ended_s, "error": error, **(memory or {})}
        self._close(self._timed(replace(self._records[number], **changes)))

    def _close(self, record: TrialRecord) -> None:
        """Write a trial's result.json and tell the listeners, once the journal has the end."""
        self._folder.write_result(record.number, record.result())
        self._update(record)
        if record.outcome not in GOING_ON:
            del self._records[record.number]
        drop_if_ended(record)

    def _update(self, record: TrialRecord) -> None:
        self._records[record.number] = record
        if self._freezer is not None:
            self._freezer.on_trial_updated(record)
        self._tell_listeners(record)

    def _tell_listeners(self, record: TrialRecord) -> None:
        for listener in self._listeners:
            listener.on_trial_updated(record)
