"""The ledger: what the sweep knows while it runs. It stands between Ray's hooks and the study, and needs neither Ray nor a GPU.

Every event ends in the journal before anyone else hears of it; then the listeners (terminal, tracker) get the trial's record.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any, Protocol

from engine.errors import StorageError, first_line
from engine.files import storage_fault
from sweep.outcome import Outcome, Proposal, TrialRecord
from sweep.runs import SweepFolder
from sweep.study import Study

MAX_INFEASIBLE = 20  # proposals that do not fit the card, for each trial asked for; then the sweep ends with those it has
MAX_INFEASIBLE_AT_ONCE = 20  # then Tune's loop has its turn: a plan takes a tenth of a second, and reports wait meanwhile


class Next(Enum):
    """What next_trial() answers when it has no trial to give."""

    WAIT = "all slots are taken, or a running trial may still have to be started again, or to be asked again at once"
    FINISHED = "the number of trials is reached, or the space is used up, or nothing that fits is found; and nothing runs"


class Listener(Protocol):
    """Hears of a trial after the journal has it."""

    def trial_updated(self, record: TrialRecord) -> None: ...


class Ledger:
    """Hands out trials, takes their reports and ends. Not thread-safe: the driver's one thread calls it."""

    def __init__(
        self,
        study: Study,
        folder: SweepFolder,
        *,
        num_trials: int,
        num_rungs: int,
        num_slots: int,
        max_retries: int,
        listeners: tuple[Listener, ...] = (),
        note: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """note: takes a line for the user about what is not a trial's state."""
        self._study, self._folder, self._clock, self._listeners, self._note = study, folder, clock, listeners, note
        self._num_trials, self._num_rungs, self._num_slots, self._max_retries = num_trials, num_rungs, num_slots, max_retries
        self._records = {record.number: record for record in study.records()}
        self._waiting: list[int] = []
        self._live: set[int] = set()
        self._retries: dict[int, int] = {}
        self._exhausted = False
        self.storage_fault: str | None = None  # why the sweep must stop and be resumed, in one line

    @property
    def records(self) -> list[TrialRecord]:
        """All trials so far, by number."""
        return [self._records[number] for number in sorted(self._records)]

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def shortfall(self) -> str | None:
        """Why fewer trials were started than asked for, in one line; None where that is not so, or not yet."""
        started, refused = self._num_started, len(self._records) - self._num_started
        if started >= self._num_trials or not (self._exhausted or self._has_given_up):
            return None
        if self._exhausted:
            line = f"the space is used up: {started} of {self._num_trials} trials were possible"
            return line + (f", {refused} points do not fit the card" if refused else "")
        line = f"{started} of {self._num_trials} trials were started: after {refused} proposals that do not fit the card"
        return line + " no more are made; the leaderboard says what each needs"

    @property
    def _num_started(self) -> int:
        return sum(record.outcome is not Outcome.INFEASIBLE for record in self._records.values())

    @property
    def _has_given_up(self) -> bool:
        return len(self._records) - self._num_started >= MAX_INFEASIBLE * self._num_trials

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

    def recover(self) -> list[int]:
        """After a kill: make up for what the driver did not hear. Returns the trials that will go on, with their numbers.

        Reports that are in a trial's folder but not in the study are reported; a trial whose reports are complete is told.
        """
        for number in self._study.running():
            record = self._records[number]
            self._folder.write_train_config(number, self._study.config(number))
            new = [self._study.report(number, report["rung"], report["eval_loss"]) for report in record.reports]
            if record.reports and record.reports[-1]["rung"] >= self._num_rungs:
                self._end(number, Outcome.COMPLETE)
            elif any(new) and self._study.should_prune(number):
                self._end(number, Outcome.PRUNED)
            else:
                self._waiting.append(number)
        for record in self.records:
            self._tell_listeners(record)
        return list(self._waiting)

    def has_work(self) -> bool:
        """Whether any trial is left to run or may still be asked for."""
        return bool(self._live or self._waiting) or self._may_ask()

    def next_trial(self) -> Proposal | Next:
        """The next trial to start: one to go on with, else a new one."""
        if self.storage_fault or len(self._live) >= self._num_slots:
            return Next.WAIT
        if self._waiting:
            number = self._waiting.pop(0)
            proposal = Proposal(number, self._records[number].params, self._study.config(number))
        else:
            proposal = self._ask()
        if proposal is None:
            return Next.WAIT if self._live or self._may_ask() else Next.FINISHED
        self._live.add(proposal.number)
        self._update(self._study.record(proposal.number))
        return proposal

    def reported(self, number: int, report: dict[str, Any]) -> bool:
        """Take a report in. Returns True where the trial must stop; it is then told PRUNED already."""
        if number not in self._live or self.storage_fault:
            return True
        record = self._records[number]
        if self._study.report(number, report["rung"], report["eval_loss"]):
            seen = [old for old in record.reports if old["rung"] < report["rung"]]
            self._update(dataclasses.replace(record, reports=[*seen, report]))
        if report["rung"] < self._num_rungs and self._study.should_prune(number):
            self._end(number, Outcome.PRUNED)
            return True
        return False

    def ended(
        self,
        number: int,
        outcome: Outcome,
        report: dict[str, Any] | None = None,
        error: str | None = None,
        memory: Mapping[str, float] | None = None,
    ) -> None:
        """A trial ended by itself; its last report, where it has one, arrives only here. memory: see Study.tell."""
        if number not in self._live or self.storage_fault:
            return
        if report is not None:
            record = self._records[number]
            self._study.report(number, report["rung"], report["eval_loss"])
            seen = [old for old in record.reports if old["rung"] < report["rung"]]
            self._records[number] = dataclasses.replace(record, reports=[*seen, report])
        self._end(number, outcome, error, memory)

    def lost(self, number: int) -> None:
        """The trial's process died. It goes on from its own checkpoint, a limited number of times; then it is LOST.

        StorageError where the disk is full: Tune loses trials over its own files then, which is not theirs to pay for.
        """
        if number not in self._live or self.storage_fault:
            return
        self._folder.check_room()
        self._live.discard(number)
        self._retries[number] = self._retries.get(number, 0) + 1
        if self._retries[number] > self._max_retries:
            self._end(number, Outcome.LOST, f"the worker process died {self._retries[number]} times; see driver.log")
        else:
            self._note(f"trial {number:3d}  worker process died; it goes on from its checkpoint (see driver.log)")
            self._waiting.append(number)

    def _may_ask(self) -> bool:
        return self._num_started < self._num_trials and not self._exhausted and not self._has_given_up

    def _ask(self) -> Proposal | None:
        """The next proposal that fits; those before it are recorded and cost nothing."""
        for _ in range(MAX_INFEASIBLE_AT_ONCE):
            proposal = self._study.ask() if self._may_ask() else None
            if proposal is None:
                self._exhausted = self._exhausted or self._may_ask()
                return None
            if proposal.refusal is None:
                return proposal
            self._close(self._study.record(proposal.number))
        return None

    def _end(self, number: int, outcome: Outcome, error: str | None = None, memory: Mapping[str, float] | None = None) -> None:
        self._live.discard(number)
        self._study.tell(number, outcome, error, memory)
        ended_s = self._study.record(number).ended_s or self._clock()  # the journal's, which a resume will read
        changes = {"outcome": outcome, "ended_s": ended_s, "error": error, **(memory or {})}
        self._close(dataclasses.replace(self._records[number], **changes))

    def _close(self, record: TrialRecord) -> None:
        """Write and pass on what became of a trial, once the journal has it."""
        number = record.number
        self._folder.write_result(
            number,
            {
                "number": number,
                "outcome": str(record.outcome),
                "params": record.params,
                "score": record.score,
                "num_reports": len(record.reports),
                "started_s": record.started_s,
                "ended_s": record.ended_s,
                "error": record.error,
                "predicted_peak_gib": record.predicted_peak_gib,
                "peak_allocated_gib": record.peak_allocated_gib,
            },
        )
        self._update(record)

    def _update(self, record: TrialRecord) -> None:
        self._records[record.number] = record
        self._tell_listeners(record)

    def _tell_listeners(self, record: TrialRecord) -> None:
        for listener in self._listeners:
            listener.trial_updated(record)
