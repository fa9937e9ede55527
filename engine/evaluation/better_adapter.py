"""Evaluate a trial's last adapter and its running average, and tell the better one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

from engine.adapter.running_average import RunningAverage
from engine.evaluation.eval_limits import EvalLimits
from engine.evaluation.task_metrics import TaskMetrics, TaskScores
from engine.sample_losses import SampleLosses

NO_LIMITS = EvalLimits()


@dataclass(frozen=True)
class BetterAdapter:
    """Hold the losses of both adapters; `average` is None if there is none.

    limits: those of the evaluation sets. task: what the better one scored by the metrics, None if they were not due.
    """

    last: SampleLosses
    average: SampleLosses | None
    task: TaskScores | None = None
    limits: EvalLimits = NO_LIMITS

    @property
    def is_average(self) -> bool:
        """Return True if the average exceeds limits by less, or else has the lower loss. Of equal ones the last is kept."""
        return self.average is not None and self.limits.order(self.average) < self.limits.order(self.last)

    @property
    def excess(self) -> float | None:
        """Return by how many nats the better adapter exceeds the limits; None without limits."""
        return self.limits.excess(self.kept)

    @property
    def kept(self) -> SampleLosses:
        """Return the losses of the better adapter."""
        return self.average if self.is_average else self.last


def evaluate_both(
    evaluate: Callable[[], SampleLosses],
    average: RunningAverage,
    before_exchange: Callable[[], None],
    limits: EvalLimits = NO_LIMITS,
) -> BetterAdapter:
    """Evaluate the last adapter, and then the average in its place, if there is one.

    The last adapter is in place again at the end, after an error too. before_exchange: returns when
    nothing else reads the two.
    """
    last = evaluate()
    if average.values is None:
        return BetterAdapter(last, None, limits=limits)
    before_exchange()
    with average.in_place():
        return BetterAdapter(last, evaluate(), limits=limits)


def with_scores(
    found: BetterAdapter, task: TaskMetrics | None, rung: int, average: RunningAverage, before_each: Callable[[], None]
) -> BetterAdapter:
    """Return the evaluation with what the better adapter scores, if the metrics are due at this rung.

    before_each: see TaskMetrics.measure. The last adapter is in place again at the end.
    """
    if task is None or not task.is_due(rung):
        return found
    with average.in_place() if found.is_average else nullcontext():
        return replace(found, task=task.measure(before_each))
