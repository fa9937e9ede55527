"""Say how many hours a sweep still needs, from what its trials took and how many went on at each rung.

The estimate is a mean, and it is worked out again after each report. It knows of no trial that
learns faster or slower than those before it, and of no worker that dies.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from engine.trial_report import TrialReport
from engine.units import counted
from sweep.folder.timeline import Timeline
from sweep.ledger.limits import Limits
from sweep.text import duration_text
from sweep.trials.record import GOING_ON, Outcome, TrialRecord

UNKNOWN = "-"
HOUR_S, LEAST_HOURS = 3600.0, 0.1  # fewer hours of all slots are not worth a number


@dataclass
class _Costs:
    """Sum what reports took. train_s is in steady steps, or in all steps in reports that split nothing."""

    num_tokens: int = 0
    train_s: float = 0.0
    around_s: float = 0.0
    recording_s: float = 0.0
    num_reports: int = 0

    def add(self, report: TrialReport, before: TrialReport | None) -> None:
        """Add a report. around_s: what evaluation and saves took."""
        num_tokens = report.tokens_seen - (before.tokens_seen if before else 0)
        self.num_tokens += num_tokens
        self.train_s += num_tokens / report.tokens_per_second if report.train_s is None else report.train_s
        self.around_s += (report.eval_s or 0.0) + (report.save_s or 0.0)
        self.recording_s += report.recording_s or 0.0
        self.num_reports += 1

    @property
    def all_s(self) -> float:
        return self.train_s + self.around_s + self.recording_s

    @property
    def token_s(self) -> float | None:
        return self.train_s / self.num_tokens if self.num_tokens and self.train_s > 0.0 else None


@dataclass
class _Seen:
    """What is known of a trial: the rungs it reported, how it stands, and when it was last heard of."""

    num_reports: int
    outcome: Outcome
    heard_s: float
    costs: _Costs


class TimeLeft:
    """Expect the seconds until a sweep's end. It is a listener of the ledger; any thread may ask."""

    def __init__(self, limits: Limits, grid: Sequence[int], num_points: int | None = None) -> None:
        """grid: tokens seen at each rung. num_points: of the space, None if it is continuous."""
        self._limits, self._num_points, self._grid = limits, num_points, (0, *grid)
        self._lengths = [after - before for before, after in zip([0, *grid], grid)]
        self._seen: dict[int, _Seen] = {}
        self._refused: set[int] = set()
        self._work_s = 0.0  # of all slots, expected when the seconds were last asked for
        self._costs, self._num_trained, self._lock = _Costs(), 0, threading.Lock()
        self._stands: Counter[tuple[int, Outcome]] = Counter()

    def begin(self, timeline: Timeline, clock: Callable[[], float]) -> None:
        """Start to listen, before the ledger recovers. clock: that of the timeline's events."""
        self._timeline, self._clock = timeline, clock

    def take_limits(self, limits: Limits) -> None:
        """Expect the end by these limits from now on."""
        with self._lock:
            self._limits = limits

    def on_trial_updated(self, record: TrialRecord) -> None:
        """Take a trial's record. Trials of earlier sweeps and those that do not fit are no work."""
        if record.source is not None:
            return
        with self._lock:
            if record.outcome is Outcome.INFEASIBLE:
                self._refused.add(record.number)
                return
            seen = self._seen.get(record.number)
            if seen is None:
                seen = self._seen[record.number] = _Seen(0, record.outcome, self._clock(), _Costs())
            else:
                self._stands[seen.num_reports, seen.outcome] -= 1
            self._num_trained += bool(record.reports and not seen.num_reports)
            for index in range(seen.num_reports, len(record.reports)):
                for costs in (self._costs, seen.costs):
                    costs.add(record.reports[index], record.reports[index - 1] if index else None)
            seen.num_reports, seen.outcome, seen.heard_s = len(record.reports), record.outcome, self._clock()
            self._stands[seen.num_reports, seen.outcome] += 1

    def text(self) -> str:
        """Return it in words, such as `3 of 12 trials ended, time left: about 25 min`. `-` is unknown.

        With several slots the hours of all of them follow.
        """
        with self._lock:
            num_ended = sum(count for (_, outcome), count in self._stands.items() if outcome not in GOING_ON)
            is_running = any(count for (_, outcome), count in self._stands.items() if outcome is Outcome.RUNNING)
            has_work = is_running or self._num_new() > 0
            seconds, bound = self._seconds()
            num_tokens, full_trials = self._num_tokens(), self._limits.budget.full_trials
        ended = f"{num_ended} of {counted(self._limits.num_trials, 'trial')} ended"
        if full_trials is not None:
            spent = num_tokens / self._grid[-1]
            ended, has_work = f"{spent:.4g} of {counted(full_trials, 'full trial')} spent", has_work and spent < full_trials
        if not has_work:
            return ended
        if seconds is None:
            return f"{ended}, time left: {UNKNOWN}"
        budget = self._limits.budget
        about = "about" if budget.target_loss is None and budget.target_metric is None else "at most"
        until = f" (sweep.budget.{bound})" if bound not in (None, "full_trials") else ""
        hours = min(self._work_s, seconds * self._limits.num_slots) / HOUR_S
        of_all = f", {hours:,.2g} slot hours" if self._limits.num_slots > 1 and hours >= LEAST_HOURS else ""
        return f"{ended}, time left: {about} {duration_text(max(seconds, 1.0))}{of_all}{until}"

    def seconds(self) -> float | None:
        """Return the seconds until the last trial ends, or None before the first report."""
        with self._lock:
            return self._seconds()[0]

    def _seconds(self) -> tuple[float | None, str | None]:
        """Return the seconds, and the field of the budget that ends the sweep before its trials do."""
        token_s = self._costs.token_s
        if token_s is None:
            return None, None
        shares = self._shares_going_on()
        running = list(self._running(shares, token_s))
        num_new = self._num_new()
        each_s = self._begin_s() + self._rest(0, shares, token_s)
        work_s = sum(running) + num_new * each_s
        self._work_s = work_s
        longest_s = max([*running, each_s if num_new else 0.0], default=0.0)
        ends = [(max(work_s / self._limits.num_slots, longest_s), None), *self._budget_ends()]
        return min(ends, key=lambda end: end[0])

    def _num_new(self) -> int:
        """Return how many trials may still start."""
        num_new = self._limits.num_trials - len(self._seen)
        if self._num_points is not None:
            num_new = min(num_new, self._num_points - len(self._seen) - len(self._refused))
        return max(num_new, 0)

    def _shares_going_on(self) -> list[float]:
        """Return for each rung from 0 the share of the trials that went on after their report there.

        Trials that wait, or were stopped because the budget was spent, say nothing of their last
        rung. A rung that no trial has reached yet counts as one at which all go on.
        """
        shares = []
        for rung in range(len(self._lengths)):
            on = sum(count for (reached, _), count in self._stands.items() if reached > rung)
            if rung > 0:  # a running trial has had its verdict, and trains to the next rung
                on += self._stands[rung, Outcome.RUNNING]
            over = sum(
                count
                for (reached, outcome), count in self._stands.items()
                if reached == rung and outcome not in GOING_ON
            )
            shares.append(on / (on + over) if on + over else 1.0)
        return shares

    def _rest(self, num_reports: int, shares: Sequence[float], token_s: float) -> float:
        """Return the seconds that a trial after so many reports is expected to need.

        A trial that ends before its first report counts as one that takes no time.
        """
        around_s = self._costs.around_s / self._costs.num_reports
        total_s, reaches = 0.0, 1.0
        for rung in range(num_reports, len(self._lengths)):
            if rung > num_reports or rung == 0:
                reaches *= shares[rung]
            total_s += reaches * (self._lengths[rung] * token_s + around_s)
        return total_s

    def _running(self, shares: Sequence[float], token_s: float) -> Iterator[float]:
        """Yield what each trial that has not ended is expected to need, less what it has done since its report.

        A trial that waits, or that a smaller budget stopped, goes on as long as there is a budget.
        """
        now_s = self._clock()
        for seen in self._seen.values():
            if seen.outcome in GOING_ON and seen.num_reports < len(self._lengths):
                own_s = seen.costs.token_s or token_s
                rest_s = self._rest(seen.num_reports, shares, own_s) + (0.0 if seen.num_reports else self._begin_s())
                rung_s = self._lengths[seen.num_reports] * own_s if seen.outcome is Outcome.RUNNING else 0.0
                yield max(rest_s - min(now_s - seen.heard_s, rung_s), 0.0)

    def _num_tokens(self) -> int:
        """Return the tokens that all trials have seen, up to their newest reports."""
        return sum(self._grid[seen.num_reports] for seen in self._seen.values())

    def _since_reports(self, now_s: float) -> float:
        """Return how long the running trials have trained since they were last heard of."""
        running = (seen for seen in self._seen.values() if seen.outcome is Outcome.RUNNING)
        token_s = self._costs.token_s or 0.0
        steps = [*self._lengths, 0]  # a trial that has reported all its rungs trains no more
        return sum(min(now_s - one.heard_s, steps[one.num_reports] * token_s) for one in running)

    def _begin_s(self) -> float:
        """Return what a trial takes besides its rungs: the slot's dead time, and recordings."""
        usage = self._timeline.usage
        dead_s = usage.dead_time_s / usage.num_dead_times if usage.num_dead_times else 0.0
        return dead_s + self._costs.recording_s / max(self._num_trained, 1)

    def _budget_ends(self) -> Iterator[tuple[float, str]]:
        """Yield the seconds until each limit of the budget is reached. A target cannot be foreseen."""
        slot_s, elsewhere_s = self._limits.elsewhere_s
        budget, usage, now_s = self._limits.budget, self._timeline.usage, self._clock()
        if budget.full_trials is not None:
            left = max(budget.full_trials * self._grid[-1] - self._num_tokens(), 0.0)
            token_s = (self._costs.all_s + usage.dead_time_s) / self._costs.num_tokens
            yield max(left * token_s - self._since_reports(now_s), 0.0) / self._limits.num_slots, "full_trials"
        if budget.wall_clock_hours is not None:
            yield max(budget.wall_clock_hours * HOUR_S - elsewhere_s - usage.elapsed_until_s(now_s), 0.0), "wall_clock_hours"
        if budget.gpu_hours is not None:
            left_s = budget.gpu_hours * HOUR_S - slot_s - usage.occupied_until_s(now_s)
            yield max(left_s / self._limits.num_slots, 0.0), "gpu_hours"
