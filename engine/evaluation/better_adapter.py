"""Evaluate a trial's last adapter and its running average, and tell the better one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.adapter.running_average import RunningAverage
from engine.sample_losses import SampleLosses


@dataclass(frozen=True)
class BetterAdapter:
    """Hold the losses of both adapters; `average` is None if there is none."""

    last: SampleLosses
    average: SampleLosses | None

    @property
    def is_average(self) -> bool:
        """Return True if the average has the lower loss; the last adapter is kept where they are equal."""
        return self.average is not None and self.average.mean < self.last.mean

    @property
    def kept(self) -> SampleLosses:
        """Return the losses of the better adapter."""
        return self.average if self.is_average else self.last


def evaluate_both(
    evaluate: Callable[[], SampleLosses], average: RunningAverage, before_exchange: Callable[[], None]
) -> BetterAdapter:
    """Evaluate the last adapter, and then the average in its place, if there is one.

    The last adapter is in place again at the end, after an error too. before_exchange: returns when
    nothing else reads the two.
    """
    last = evaluate()
    if average.values is None:
        return BetterAdapter(last, None)
    before_exchange()
    with average.in_place():
        return BetterAdapter(last, evaluate())
