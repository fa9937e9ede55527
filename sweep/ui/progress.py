"""Say how far a sweep is: whether its driver runs, time left, and what each slot does."""

from __future__ import annotations

from collections import Counter
from typing import Any

from engine.trial_report import REPORTS
from sweep.folder.slot_times import PARTS, both_shares, totals
from sweep.folder.sweep_folder import SweepFolder
from sweep.folder.timeline import Timeline, spent_on_finals
from sweep.ledger.limits import Limits
from sweep.ledger.time_left import HOUR_S, TimeLeft
from sweep.report.collect import Collected
from sweep.trials.record import GOING_ON, Outcome, TrialRecord


class Eta:
    """Expect a running sweep's end as its driver does, from the folder alone."""

    def __init__(self, found: Collected, timeline: Timeline) -> None:
        """timeline: the one that is followed, with the stays that are open."""
        config, num_slots = found.config, _num_slots(timeline)
        limits = Limits(
            num_trials=config.sweep.num_trials, num_rungs=len(config.train.report_grid()), num_slots=num_slots,
            max_retries=config.cluster.max_retries, budget=config.effective_budget, objectives=config.sweep.objectives,
            sign=found.rule.sign, grid=tuple(config.train.report_grid()), elsewhere_s=spent_on_finals(found.folder),
        )  # fmt: skip
        self._now_s, self._told = 0.0, {}
        self._time_left = TimeLeft(limits, config.train.report_grid(), found.space.size())
        self._time_left.begin(timeline, lambda: self._now_s)
        self.basis = (config, num_slots)
        """What the estimate rests on; it must be made again when this changes."""

    def seconds(self, found: Collected, timeline: Timeline, now_s: float) -> float | None:
        """Return the seconds until the last trial ends, or None if it cannot be told yet."""
        for record in found.records:
            if self._told.get(record.number) is not record:
                self._told[record.number] = record
                self._now_s = _heard_s(record, found.folder, timeline, now_s)
                self._time_left.on_trial_updated(record)
        self._now_s = now_s
        return self._time_left.seconds()

    def is_of(self, found: Collected, timeline: Timeline) -> bool:
        """Return whether the estimate still rests on the sweep's config and slots."""
        return self.basis == (found.config, _num_slots(timeline))


def slots(found: Collected, timeline: Timeline, driven: bool) -> list[dict[str, Any]]:
    """Return what each slot does and did: name, trial, since when, steady shares in words, seconds by part."""
    running = timeline.open_spans if driven else []
    named = {span.slot: span for span in running if span.slot is not None}
    rows, times = [], found.slot_times
    for place, time in enumerate(times, 1):
        span = next((named.pop(name) for name in time.names if name in named), None)
        parts = {PARTS[part]: seconds for part, seconds in time.parts.items() if seconds > 0.0}
        row = {"name": time.names[-1] if time.names else f"slot {place}", "steady": both_shares(time.parts), "parts": parts}
        rows.append({**row, "trial": span and span.trial, "since_s": span and span.assigned_s})
    silent = [span for span in running if span.slot is None]  # a trial names its slot in its first report
    free = [row for row in rows if row["trial"] is None]
    if len(free) > 1 and any(time.names for time in times):
        free = [dict(row, name="slot not reported yet", parts={}, steady="") for row in silent and free]
        rows += free[: len(silent)]
    for row, span in zip(free, silent):
        row |= {"trial": span.trial, "since_s": span.assigned_s}
    return rows


def progress(found: Collected, timeline: Timeline, driven: bool, left_s: float | None, now_s: float) -> dict[str, Any]:
    """Return counts and times of the whole sweep."""
    own = [record for record in found.records if record.source is None]
    counts = Counter(str(record.outcome) for record in own)
    tried = [record for record in own if record.outcome is not Outcome.INFEASIBLE]
    running = sum(record.outcome is Outcome.RUNNING for record in tried)
    ended = sum(record.outcome not in GOING_ON for record in tried)
    usage = timeline.usage if driven else found.timeline.usage
    return {
        "is_driven": driven,
        "now_s": now_s,
        "last_event_s": usage.newest_s or None,
        "num_trials": found.config.sweep.num_trials,
        "num_ended": ended,
        "num_running": running,
        "num_waiting": len(tried) - running - ended,
        "outcomes": {outcome.value: counts[outcome] for outcome in Outcome if counts[outcome]},
        "left_s": left_s if driven else None,
        "elapsed_s": usage.elapsed_until_s(now_s),
        "steady": both_shares(totals(found.slot_times)),
        "slot_hours": usage.occupied_until_s(now_s) / HOUR_S,
        "num_tokens": sum(record.reports[-1].tokens_seen for record in own if record.reports),
    }


def _num_slots(timeline: Timeline) -> int:
    """Return the slots of the newest session."""
    return (timeline.sessions[-1].num_slots if timeline.sessions else None) or 1


def _heard_s(record: TrialRecord, folder: SweepFolder, timeline: Timeline, now_s: float) -> float:
    """Return when a trial last started or reported."""
    span = timeline.span(record.number)
    heard_s = [span.assigned_s] if span is not None else []
    if record.reports:
        heard_s.append((folder.trial(record.number) / REPORTS).stat().st_mtime)
    return min(max(heard_s, default=now_s), now_s)
