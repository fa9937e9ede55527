"""Record when each trial held which slot, and what it did there: events in `timeline.jsonl`.

The file records time only, and the journal records results. If the file were lost, a resumed sweep
would only count its budget from zero. Lines are appended without waiting for the disk. They survive
a kill, and cost a decision some microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.trial_report import START, WAITING
from sweep.folder.sweep_folder import SweepFolder

UNREPORTED = "unreported"


@dataclass(frozen=True, slots=True)
class Span:
    """Record one stay of a trial in a slot, in Unix seconds. A resumed trial has several stays.

    slot: the worker's place, None until it has reported. assigned_s: when the driver gave the slot
    to the trial. began_s: when the worker began with the trial. ended_s: None while it runs.

    dead_time_s: from the end of the previous trial in the same worker to this trial's first step.
    It is None for a worker's first trial, which loads the base model.

    parts: seconds by what was done, as the worker measured it (see PartClock). From assigned_s to
    began_s it is START. What no worker told is UNREPORTED: the last moments of a process that died,
    or all of a stay that an older version recorded. The parts of an ended stay add up to it.
    session: index in Timeline.sessions. split_s: until when parts are known.
    """

    trial: int
    assigned_s: float
    slot: str | None = None
    began_s: float | None = None
    dead_time_s: float | None = None
    ended_s: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    session: int = 0
    split_s: float = 0.0

    def split_until(self, at_s: float, measured: Mapping[str, float] | None) -> Span:
        """Return the stay with its parts up to at_s.

        measured: the parts since the event before, None if no one measured. A worker's seconds are
        those of another clock, so they are fitted into the time that passed here. The rest passed
        between worker and driver: the slot waited.
        """
        parts, since_s = dict(self.parts), max(self.split_s, self.assigned_s)
        if self.split_s < (self.began_s or 0.0):
            parts[START] = parts.get(START, 0.0) + max(self.began_s - since_s, 0.0)
            since_s = max(self.began_s, since_s)
        left_s, measured = max(at_s - since_s, 0.0), {k: v for k, v in (measured or {}).items() if v > 0.0} or None
        if measured is not None:
            scale = min(1.0, left_s / sum(measured.values()))
            for part, seconds in measured.items():
                parts[part] = parts.get(part, 0.0) + scale * seconds
            left_s = max(left_s - scale * sum(measured.values()), 0.0)
        if left_s:
            rest = UNREPORTED if measured is None else WAITING
            parts[rest] = parts.get(rest, 0.0) + left_s
        return replace(self, parts=parts, split_s=at_s)


@dataclass(frozen=True)
class Session:
    """Record one run of the driver, in Unix seconds of its own clock.

    num_slots: trials that could run at once, None if an older version recorded it. ended_s: the
    newest event.
    """

    began_s: float
    ended_s: float
    num_slots: int | None = None


@dataclass(frozen=True)
class Usage:
    """Sum what was spent up to the newest event, over all sessions.

    A value never changes, so other threads may read it.

    occupied_s: seconds of the stays that have ended, over all slots. assigned_s: when the open
    stays began, in Unix seconds. elapsed_s: seconds of the sessions that have ended. session_s:
    when this session began, None if none runs. dead_time_s: the sum over num_dead_times stays.
    newest_s: the time of the newest event. parts: sums of the stays' parts, see Span.
    """

    occupied_s: float = 0.0
    assigned_s: tuple[float, ...] = ()
    elapsed_s: float = 0.0
    session_s: float | None = None
    dead_time_s: float = 0.0
    num_dead_times: int = 0
    newest_s: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)

    def occupied_until_s(self, now_s: float) -> float:
        """Return the seconds for which trials held slots, over all slots."""
        return self.occupied_s + sum(max(now_s - assigned_s, 0.0) for assigned_s in self.assigned_s)

    def elapsed_until_s(self, now_s: float) -> float:
        """Return the seconds for which the sweep ran.

        The time between a stop and a resume does not count.
        """
        return self.elapsed_s + (0.0 if self.session_s is None else max(now_s - self.session_s, 0.0))


class Timeline:
    """Append events, and keep the sums that a budget needs."""

    def __init__(self, file: Path, *, mend: bool = True, follow: bool = False) -> None:
        """Read the events that earlier sessions of the sweep left in the file.

        mend: drop a torn last line. Use False to only read the file, since a running sweep may be
        about to write the rest of that line. follow: leave the last session open, so that
        `catch_up` can add what its driver writes.
        """
        if mend:
            _mend(file)
        self._file, self._num_read = file, 0
        self.spans: list[Span] = []  # ended stays, in the order of their ends
        self.sessions: list[Session] = []
        self._open: dict[int, Span] = {}
        self._last: dict[int, Span] = {}
        self._parts: dict[str, float] = {}
        self.usage = Usage()
        self.catch_up()
        if not follow:
            self._end_session()

    @property
    def open_spans(self) -> list[Span]:
        """Return the stays that have not ended."""
        return list(self._open.values())

    def catch_up(self) -> bool:
        """Read the whole lines that were added since the last call; return whether there were any."""
        with suppress(FileNotFoundError), open(self._file, "rb") as file:
            file.seek(self._num_read)
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._num_read += len(whole)
            for line in whole.splitlines():
                self._apply(json.loads(line))
            return bool(whole)
        return False

    def settled(self) -> Timeline:
        """Return a copy in which the open session and its stays end at the newest event."""
        other = copy(self)
        other.spans, other.sessions = list(self.spans), list(self.sessions)
        other._open, other._last, other._parts = dict(self._open), dict(self._last), dict(self._parts)
        other._end_session()
        return other

    def start_session(self, now_s: float, num_slots: int | None = None) -> None:
        """Record that the driver begins to hand out trials, at first or after a resume."""
        self._add({"event": "session", "at_s": now_s, "num_slots": num_slots})

    def on_assigned(self, trial: int, now_s: float) -> None:
        self._add({"event": "assigned", "at_s": now_s, "trial": trial})

    def on_reported(self, trial: int, now_s: float, timing: dict[str, Any]) -> None:
        """Record a report. timing: slot, began_s, dead_time_s and parts, as the worker knows them."""
        self._add({"event": "reported", "at_s": now_s, "trial": trial, **timing})

    def on_ended(self, trial: int, now_s: float, timing: dict[str, Any]) -> None:
        """Record that the trial left its slot. timing: as for on_reported."""
        self._add({"event": "ended", "at_s": now_s, "trial": trial, **timing})

    def span(self, trial: int) -> Span | None:
        """Return the trial's newest stay, or None if it has none."""
        return self._open.get(trial) or self._last.get(trial)

    def occupied_s(self, now_s: float) -> float:
        """Return the seconds for which trials held slots, over all slots and sessions."""
        return self.usage.occupied_until_s(now_s)

    def elapsed_s(self, now_s: float) -> float:
        """Return the seconds for which the sweep ran, over all sessions.

        The time between a stop and a resume does not count.
        """
        return self.usage.elapsed_until_s(now_s)

    def _add(self, event: dict[str, Any]) -> None:
        self._apply(event)
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def _apply(self, event: dict[str, Any]) -> None:
        kind, at_s, trial = event["event"], event["at_s"], event.get("trial")
        if kind == "session":
            self._end_session()
            # someone may have set the clock back since the session before
            self.usage = replace(self.usage, session_s=at_s, newest_s=at_s)
            self.sessions.append(Session(at_s, at_s, event.get("num_slots")))
        else:  # an older version took the time within a session from that clock, too
            at_s = max(at_s, self.usage.newest_s)
            if not self.sessions:
                self.sessions.append(Session(at_s, at_s))
            self.sessions[-1] = replace(self.sessions[-1], ended_s=at_s)
        if kind == "assigned":
            self._open[trial] = Span(trial, at_s, session=len(self.sessions) - 1, split_s=at_s)
        elif trial in self._open:
            self._learn(trial, {**event, "at_s": at_s})
            if kind == "ended":
                self._close(trial, at_s)
        assigned_s = tuple(span.assigned_s for span in self._open.values())
        self.usage = replace(self.usage, assigned_s=assigned_s, newest_s=at_s, parts=dict(self._parts))

    def _learn(self, trial: int, event: dict[str, Any]) -> None:
        """Add to the stay what the worker knows of it.

        Every report carries the dead time, which counts once.
        """
        span = self._open[trial]
        known = {name: event[name] for name in ("slot", "began_s", "dead_time_s") if name in event}
        if known.get("began_s") is not None:  # by the clock of the worker's machine
            known["began_s"] = min(max(known["began_s"], span.assigned_s), event["at_s"])
        if known.get("dead_time_s") is not None:
            known["dead_time_s"] = max(known["dead_time_s"], 0.0)
        split = replace(span, **known).split_until(event["at_s"], event.get("parts"))
        self._add_parts(span, split)
        self._open[trial] = split
        if span.dead_time_s is None and known.get("dead_time_s") is not None:
            sum_s = self.usage.dead_time_s + known["dead_time_s"]
            self.usage = replace(self.usage, dead_time_s=sum_s, num_dead_times=self.usage.num_dead_times + 1)

    def _end_session(self) -> None:
        """Close the stays and the session that a killed driver left open, at its last event."""
        for trial in list(self._open):
            self._close(trial, self.usage.newest_s)
        if self.usage.session_s is not None:
            elapsed_s = self.usage.elapsed_until_s(self.usage.newest_s)
            self.usage = replace(self.usage, elapsed_s=elapsed_s, session_s=None)

    def _close(self, trial: int, at_s: float) -> None:
        """Move the stay from the open to the ended ones in one step.

        A reader between two steps would see time run backwards.
        """
        span = self._open.pop(trial)
        split = span.split_until(at_s, None)
        self._add_parts(span, split)
        self._last[trial] = replace(split, ended_s=at_s)
        self.spans.append(self._last[trial])
        assigned_s = tuple(other.assigned_s for other in self._open.values())
        occupied_s = self.usage.occupied_s + at_s - span.assigned_s
        self.usage = replace(self.usage, occupied_s=occupied_s, assigned_s=assigned_s, parts=dict(self._parts))

    def _add_parts(self, before: Span, after: Span) -> None:
        for part, seconds in after.parts.items():
            self._parts[part] = self._parts.get(part, 0.0) + seconds - before.parts.get(part, 0.0)


def _mend(file: Path) -> None:
    """Drop a last line that a kill tore, so that the next event starts a line."""
    if file.is_file():
        text = file.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):
            file.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")


def spent_on_finals(folder: SweepFolder) -> tuple[float, float]:
    """Return the slot seconds and the seconds that earlier sessions spent on finalists."""
    file = SweepFolder(folder.final_seeds).timeline
    if not file.is_file():
        return 0.0, 0.0
    usage = Timeline(file, mend=False).usage
    return usage.occupied_until_s(0.0), usage.elapsed_until_s(0.0)
