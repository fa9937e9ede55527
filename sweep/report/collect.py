"""Collect from a sweep's folder what report and live page show. Nothing is written.

The sweep may be running, at rest, or copied from elsewhere. A collector reads again only what has
changed since its last call, so that a page can ask often.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engine.errors import InputError, first_line
from engine.trial_report import REPORTS
from sweep.config.sweep import SweepConfig
from sweep.folder.slot_times import SlotTime, slot_times
from sweep.folder.sweep_folder import SweepFolder
from sweep.folder.timeline import Timeline
from sweep.results.contest import with_contest
from sweep.results.verdict import SweepVerdict, read_verdict
from sweep.space.parse import parse_space
from sweep.space.space import Space
from sweep.steering.history import History
from sweep.study.begun_with import read_unedited_config
from sweep.study.journal import DAMAGED, FollowedJournal, FrozenTrial, record_of
from sweep.study.kept_commands import taken_commands
from sweep.trials.record import TrialRecord
from sweep.trials.selection import Rule

Stamp = tuple[int, int, int] | None  # of a file: inode, size, time of the last change


@dataclass(frozen=True)
class Collected:
    """Hold a sweep as its folder tells it at one moment.

    timeline: ended at its newest event, see Timeline.settled. rule: with the contest between the
    trials. trials: Optuna's, in the order of `records`. history: the commands that the sweep took.
    """

    folder: SweepFolder
    config: SweepConfig
    space: Space
    trials: list[FrozenTrial]
    records: list[TrialRecord]
    timeline: Timeline
    rule: Rule
    verdict: SweepVerdict
    history: History

    @cached_property
    def slot_times(self) -> list[SlotTime]:
        """Return what each slot's time went to, up to the newest event."""
        return slot_times(self.timeline)

    @property
    def best(self) -> TrialRecord | None:
        return self.verdict.best


class Collector:
    """Read one sweep's folder, as often as asked."""

    def __init__(self, folder: SweepFolder) -> None:
        self.folder = folder
        self._known: dict[int, tuple[FrozenTrial, Stamp, TrialRecord]] = {}
        self._journal, self._timeline = FollowedJournal(folder), Timeline(folder.timeline, mend=False, follow=True)
        self._stamps: dict[str, Stamp] = {}
        self._last: Collected | None = None
        self._attributes: dict[str, Any] = {}

    def collect(self) -> Collected:
        """Return the sweep as it is now: the same object as in the last call if nothing has changed.

        Raises InputError for a folder that cannot be read.
        """
        try:
            return self._collect()
        except InputError:
            raise
        except DAMAGED as error:
            raise damaged(self.folder, error) from error

    def _collect(self) -> Collected:
        last, is_new = self._last, self._has_changed("sweep_config.json", "leaderboard.json", "final-seeds/study.journal")
        trials, attributes = self._journal.trials(), self._journal.attributes()  # commands are there, and change settings
        is_new, self._attributes = is_new or attributes != self._attributes, attributes
        if last is None or is_new:
            config = read_unedited_config(self.folder, attributes)
            self._space, self._base = parse_space(config.space), config.base().model_dump(mode="json")
        else:
            config = last.config
        is_later = self._timeline.catch_up()
        records = self._records_of(trials)
        are_same = last is not None and len(last.records) == len(records) and all(map(_is, last.records, records))
        if last is not None and are_same and not is_new and not is_later:
            return last
        if last is None or is_new or not are_same:
            rule = with_contest(config.rule, records)
            verdict = read_verdict(self.folder, records, rule)
        else:
            rule, verdict = last.rule, last.verdict
        history = History(taken_commands(self._attributes)) if last is None or is_new else last.history
        timeline = self._timeline.settled()
        self._last = Collected(self.folder, config, self._space, trials, records, timeline, rule, verdict, history)
        return self._last

    @property
    def timeline(self) -> Timeline:
        """Return the timeline with the stays that are still open."""
        return self._timeline

    def _records_of(self, trials: list[FrozenTrial]) -> list[TrialRecord]:
        return [self._record(trial) for trial in trials]

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        """Return the trial's record; the same object if neither journal nor reports have changed."""
        stamp = _stamp(self.folder.trial(trial.number) / REPORTS)
        known = self._known.get(trial.number)
        if known is not None and known[0] is trial and known[1] == stamp:
            return known[2]
        record = record_of(trial, self.folder, lambda params: self._space.merged(self._base, params))
        self._known[trial.number] = (trial, stamp, record)
        return record

    def _has_changed(self, *names: str) -> bool:
        """Return whether one of the folder's files has changed since the last call."""
        stamps = {name: _stamp(self.folder.path / name) for name in names}
        before, self._stamps = self._stamps, stamps
        return stamps != before


def damaged(folder: SweepFolder, error: BaseException) -> InputError:
    """Return what to raise for a journal or timeline that is not a sweep's."""
    return InputError("folder", str(folder.path), f"has a damaged journal or timeline ({first_line(error)})")


def _is(one: TrialRecord, other: TrialRecord) -> bool:
    return one is other


def _stamp(file: os.PathLike[str]) -> Stamp:
    """Return what tells one state of a file from another; None if there is no file."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
