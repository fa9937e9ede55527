"""Let a user's commands steer the ledger.

The journal gets each command before it acts, and holds all that follows from it. A running trial
that must leave its slot saves first; it has left once it reports or its process answers. A kill in
between changes nothing: the resume finds the command in the journal, and the trial leaves then.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.trial_report import TrialReport
from engine.units import counted
from sweep.config.sweep import SweepConfig
from sweep.folder.notes import LEAVE
from sweep.folder.sweep_folder import SweepFolder
from sweep.ledger.answers import Next
from sweep.ledger.ledger import NO_TIMING, Ledger
from sweep.ledger.limits import Limits
from sweep.space.space import Space
from sweep.steering.checks import changed_settings, check_trial, own_point
from sweep.steering.command import ENTERS_A_TRIAL, TAKES_A_TRIAL, Command, Kind
from sweep.steering.history import History, TakenCommand, with_settings
from sweep.steering.inbox import unread
from sweep.steering.parent_adapter import keep_start
from sweep.study.study import FitCheck, Study
from sweep.text import params_text
from sweep.trials.record import Outcome, Proposal, TrialRecord
from sweep.trials.warm_from import WarmFrom

LOOK_EVERY_S = 0.5  # a listing takes microseconds on a local disk, but a round trip on a shared one


class SteeredLedger(Ledger):
    """Hand out trials as the ledger does, and do what commands ask for."""

    def __init__(
        self,
        study: Study,
        folder: SweepFolder,
        limits: Limits,
        *,
        config: SweepConfig,
        space: Space,
        fit_check: FitCheck,
        on_limits: Callable[[Limits], None] = lambda limits: None,
        monotonic: Callable[[], float] = time.monotonic,
        **options: Any,
    ) -> None:
        """config: with the settings of all commands in the journal. on_limits: called with changed limits.

        options: as for Ledger.
        """
        super().__init__(study, folder, limits, monotonic=monotonic, **options)
        self._config, self._space, self._fit_check, self._on_limits = config, space, fit_check, on_limits
        self._base = config.base().model_dump(mode="json")
        self._look_clock, self._looked_s = monotonic, float("-inf")
        self._history, self._is_recovering = History(study.commands.taken), False
        self._apply_state()

    @property
    def config(self) -> SweepConfig:
        """Return the sweep's config as all commands so far have changed it."""
        return self._config

    @property
    def is_finished(self) -> bool:
        """Return whether a command lets no trial begin any more, until `add` takes that back."""
        return self._history.finished_by is not None

    @property
    def shortfall(self) -> str | None:
        finished_by, num_paused = self._history.finished_by, len(self._history.held.keys() & self._records.keys())
        paused = f"{counted(num_paused, 'trial')} paused by a command until `go-on`" if num_paused else ""
        if finished_by is None:
            known = super().shortfall if self._budget.spent() or not paused else None
            return "; ".join(filter(None, [known, paused])) or None
        started = f"{self._quota.num_started} of {self._quota.num_trials} trials started"
        return "; ".join(filter(None, [f"{finished_by.who} finished the sweep: {started}", paused, "`add` goes on"]))

    def recover(self) -> list[int]:
        if self._freezer is None:  # the pruner judged them before they were paused, and others since by what it saw
            for number in [number for number, record in self._records.items() if record.outcome is Outcome.PAUSED]:
                self._study.should_prune(number)
        self._is_recovering = True
        super().recover()
        self._is_recovering = False
        for number in [number for number in self._history.stopped if number in self._records]:
            self._depart(number)
        queued = [number for one in self._history.queued() if (number := self._still_queued(one)) is not None]
        queued = list(dict.fromkeys(reversed(queued)))[::-1]  # the last place counts
        self._waiting = [number for number in self._waiting if number not in queued] + queued
        return list(self._waiting)

    def poll(self) -> None:
        """Take the commands that wait, if it is time to look for some."""
        now_s = self._look_clock()
        if now_s - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = now_s
            self.take_commands()

    def take_commands(self) -> None:
        """Enter the commands that wait in the journal, and do what they ask for."""
        if self.storage_fault or self.is_winding_down:
            return
        for file, command in unread(self._folder):
            if isinstance(command, str):
                self._note(f"command    {command}; it was removed")
            elif command.id not in self._history.ids:
                self._take_command(command)
            file.unlink(missing_ok=True)

    def next_trial(self) -> Proposal | Next:
        answer = super().next_trial()
        if answer is Next.FINISHED:  # Tune asks no more after that
            self.take_commands()
            return Next.WAIT if self.has_work() else answer
        return answer

    def reported(self, number: int, report: TrialReport, timing: Mapping[str, Any] = NO_TIMING) -> bool:
        must_stop = super().reported(number, report, timing)
        return self._depart(number) or must_stop

    def _queue(self, number: int) -> None:
        if not self._depart(number):
            super()._queue(number)

    def _is_protected(self, number: int) -> bool:
        if self._is_recovering and self._history.rungs.get(number) == len(self._records[number].reports):
            return True  # its verdict was given before the last command, by what was known then
        if number in self._history.kept or self._records[number].warm is not None:  # a warm clone compares with none
            return True
        return self._freezer is not None and self._quota.is_closed

    def _continued(self, number: int) -> Proposal:
        self._note_to_leave(number).unlink(missing_ok=True)
        return super()._continued(number)

    def _depart(self, number: int) -> bool:
        """End the trial, or let it wait, if a command asks for that. Returns whether it has left."""
        record, stop, hold = self._records.get(number), self._history.stopped.get(number), self._history.held.get(number)
        if record is None or self.storage_fault:
            return False
        if stop is None and (hold is None or record.outcome is not Outcome.RUNNING):
            return False
        self._note_to_leave(number).unlink(missing_ok=True)
        if stop is not None:
            self._folder.drop_result(number)  # that of a paused one: after a kill only the journal says how it stands
            self._end(number, Outcome.PRUNED, f"stopped by {stop.who}")
        else:
            self._stop(number, Outcome.PAUSED)
        return True

    def _note_to_leave(self, number: int) -> Path:
        return self._folder.trial(number) / LEAVE

    def _take_command(self, command: Command) -> None:
        try:
            taken = self._checked(command)
        except InputError as error:
            taken = TakenCommand(command, time.time(), str(error))
        number, records = command.number if command.kind is Kind.GO_ON else None, self._records.items()
        settled = {n: r for n, r in records if r.outcome is Outcome.RUNNING or n in self._waiting or n == number}
        taken = replace(taken, rungs={number: len(record.reports) for number, record in settled.items()})
        self._study.commands.add(taken)
        self._history.take(taken)
        self._note(f"command    {taken.text}")
        if taken.refusal is None:
            self._act(taken)

    def _checked(self, command: Command) -> TakenCommand:
        """Return the command with all that follows from it. Raises InputError to refuse it."""
        record = self._known(command.number) if command.kind in TAKES_A_TRIAL else None
        if command.kind in TAKES_A_TRIAL:
            check_trial(command, record, self._history)
        if command.warm:  # its folder may have a report that the ledger has not heard of
            record = self._study.record(command.number)
        if command.kind in (Kind.ADD, Kind.GO_ON, *ENTERS_A_TRIAL) and (reason := self._budget.spent()):
            raise command.refused(f"{reason}; `budget` allows more")
        settings = changed_settings(command, self._config)
        taken = TakenCommand(command, time.time(), settings=settings)
        with_settings(self._config, taken)
        if command.kind not in ENTERS_A_TRIAL:
            return taken
        point, number = own_point(command, record, self._space, self._base), self._study.commands.next_trial
        if not command.warm and not self._study.is_new(point):
            raise command.refused(f"another trial has that point already: {params_text(point)}")
        fit = self._fit_check(self._space.apply(self._base, point))
        if not fit.fits:
            raise command.refused(f"{params_text(point)} does not fit the card: {fit.reason}")
        return replace(taken, point=point, trial=number, warm=self._kept_start(command, record, point) if command.warm else None)

    def _kept_start(self, command: Command, record: TrialRecord, point: dict[str, Any]) -> WarmFrom:
        """Copy the adapter that the next trial begins with. Raises InputError, without a copy left, to refuse the command."""
        number = self._study.commands.next_trial
        try:
            warm = keep_start(command, record, self._folder, number)
            if not self._study.is_new(point, warm):
                raise command.refused(f"another trial began with that adapter at that point already: {params_text(point)}")
        except InputError:
            shutil.rmtree(self._folder.start(number), ignore_errors=True)
            raise
        return warm

    def _known(self, number: int) -> TrialRecord | None:
        if number in self._records:
            return self._records[number]
        return self._study.record(number) if number < self._study.commands.next_trial else None

    def _act(self, taken: TakenCommand) -> None:
        kind, number = taken.command.kind, taken.command.number
        if taken.settings:
            self._change_limits(with_settings(self._config, taken))
        self._apply_state()
        if taken.point is not None:
            self._enter(taken)
        elif kind in (Kind.STOP, Kind.PAUSE):
            self._ask_to_leave(number)
        elif kind is Kind.GO_ON:
            self._note_to_leave(number).unlink(missing_ok=True)
            if number not in self.live and number not in self._waiting:
                self._waiting.append(number)

    def _apply_state(self) -> None:
        """Let quota and freezer follow the commands."""
        self._quota.is_closed = self.is_finished
        if self._freezer is not None:
            self._freezer.hold(self._history.held)

    def _ask_to_leave(self, number: int) -> None:
        if number in self.live:
            self._note_to_leave(number).touch()
            return
        if number in self._waiting:
            self._waiting.remove(number)
        self._depart(number)

    def _change_limits(self, config: SweepConfig) -> None:
        """Go on with the config's number of trials and budget, and with trials that the old one stopped."""
        self._config = config
        self._folder.write_config(config)  # for who reads it; a resume goes by the journal
        self._limits = replace(self._limits, num_trials=config.sweep.num_trials, budget=config.effective_budget)
        self._quota.num_trials = self._limits.num_trials
        self._budget.change(self._limits)
        if self._freezer is not None:
            self._freezer.change(self._limits)
        self._on_limits(self._limits)
        if not self._budget.spent():
            for number, record in sorted(self._records.items()):
                if record.outcome is Outcome.STOPPED and number not in self._waiting and self._keeps_slot(number):
                    self._queue(number)

    def _enter(self, taken: TakenCommand) -> None:
        """Enter the trial that a command asks for. It takes the next slot that no other trial waits for."""
        proposal = self._study.ask(taken.point, taken.warm)
        record = self._study.record(proposal.number)
        if proposal.refusal is not None:  # a resume on a smaller card
            self._quota.num_refused += 1
            self._close(record)
            return
        self._quota.num_started += 1
        self._records[proposal.number] = record
        if self._freezer is not None:
            self._freezer.on_trial_updated(record)
        self._waiting.append(proposal.number)

    def _still_queued(self, one: TakenCommand) -> int | None:
        """Return the trial that the command gave a place in the queue, if it is still there.

        Enters the trial if a kill came first.
        """
        if one.trial is not None:
            if one.trial >= self._study.commands.next_trial:
                self._enter(one)
            has_begun = self.timeline.span(one.trial) is not None or one.trial not in self._records
            is_running = not has_begun and self._records[one.trial].outcome is Outcome.RUNNING
            return one.trial if is_running else None
        number = one.command.number
        record = self._records.get(number)
        if record is None or record.outcome is not Outcome.PAUSED or number in self._history.held:
            return None
        return number if len(record.reports) == one.rungs.get(number, len(record.reports)) else None
