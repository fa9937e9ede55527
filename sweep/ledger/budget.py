"""Decide when a sweep has spent its budget: target loss, tokens, GPU hours or wall-clock hours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from sweep.folder.timeline import Timeline
from sweep.ledger.limits import Limits
from sweep.trials.record import CONTENDERS, Outcome, TrialRecord

HOUR_S = 3600.0


class Budget:
    """Compare one sweep's limits with what it has spent."""

    def __init__(self, limits: Limits, timeline: Timeline, clock: Callable[[], float]) -> None:
        self._limits, self._timeline, self._clock, self._elsewhere_s = limits, timeline, clock, limits.elsewhere_s
        self._lowest_loss, self._lowest_cost, self._spent = math.inf, math.inf, None
        self.num_tokens = 0  # up to the newest report of each trial

    def take_earlier(self, records: Iterable[TrialRecord]) -> None:
        """Take what the trials of this sweep's earlier sessions have cost and reached."""
        for record in records:
            if record.source is None and record.reports:
                self.num_tokens += self._limits.tokens_at(record.reports[-1].rung)
                if record.outcome in (*CONTENDERS, Outcome.RUNNING):
                    within = [report.eval_loss for report in record.reports if not report.over_limits]
                    self._lowest_loss = min([self._lowest_loss, *within])
                    self._lowest_cost = min(self._lowest_cost, _cost(record))

    def take(self, record: TrialRecord, rung_before: int) -> None:
        """Take the newest report of a trial. rung_before: that of the report before it, 0 if it is the first."""
        report = record.reports[-1]
        rung = report.rung
        if not report.over_limits:
            self._lowest_loss = min(self._lowest_loss, report.eval_loss)
        self._lowest_cost = min(self._lowest_cost, _cost(record))
        self.num_tokens += self._limits.tokens_at(rung) - self._limits.tokens_at(rung_before)

    def spent(self) -> str | None:
        """Return in one line why the sweep ends now, or None while every limit holds.

        A spent budget stays spent for the rest of the session.
        """
        if self._spent is None:
            self._spent = self._reached()
        return self._spent

    def _reached(self) -> str | None:
        limits, now_s, token_limit = self._limits.budget, self._clock(), self._limits.token_limit
        if limits.target_loss is not None and self._lowest_loss <= limits.target_loss:
            return f"sweep.budget.target_loss = {limits.target_loss:g} is reached (eval loss {self._lowest_loss:.4f})"
        target, sign = limits.target_metric, self._limits.sign
        if target is not None and self._lowest_cost <= sign * target:
            return f"sweep.budget.target_metric = {target:g} is reached ({sign * self._lowest_cost:.4f})"
        if token_limit is not None and self.num_tokens >= token_limit:
            return f"sweep.budget.full_trials = {limits.full_trials:g} is spent ({self.num_tokens:,} tokens in all trials)"
        gpu_hours = (self._timeline.occupied_s(now_s) + self._elsewhere_s[0]) / HOUR_S
        wall_clock_hours = (self._timeline.elapsed_s(now_s) + self._elsewhere_s[1]) / HOUR_S
        if limits.gpu_hours is not None and gpu_hours >= limits.gpu_hours:
            return f"sweep.budget.gpu_hours = {limits.gpu_hours:g} is spent ({gpu_hours:.4g} hours of slots used)"
        if limits.wall_clock_hours is not None and wall_clock_hours >= limits.wall_clock_hours:
            return f"sweep.budget.wall_clock_hours = {limits.wall_clock_hours:g} is spent ({wall_clock_hours:.4g} hours)"
        return None


def _cost(record: TrialRecord) -> float:
    """Return the trial's score so far; infinity if it has none, or is above its limits."""
    return record.score if record.score is not None and record.keeps_limits else math.inf
