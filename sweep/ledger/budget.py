"""Decide when a sweep has spent its budget: target loss, GPU hours or wall-clock hours."""

from __future__ import annotations

import math
from collections.abc import Callable

from sweep.config.sweep import BudgetConfig
from sweep.folder.timeline import Timeline

HOUR_S = 3600.0


class Budget:
    """Compare one sweep's limits with what it has spent."""

    def __init__(
        self,
        limits: BudgetConfig,
        timeline: Timeline,
        clock: Callable[[], float],
        elsewhere_s: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """elsewhere_s: slot seconds and seconds that the sweep spent outside this timeline."""
        self._limits, self._timeline, self._clock, self._elsewhere_s = limits, timeline, clock, elsewhere_s
        self._lowest_loss, self._spent = math.inf, None

    def take_loss(self, eval_loss: float) -> None:
        """Note the eval_loss of one of the sweep's adapters."""
        self._lowest_loss = min(self._lowest_loss, eval_loss)

    def spent(self) -> str | None:
        """Return in one line why the sweep ends now, or None while every limit holds.

        A spent budget stays spent for the rest of the session.
        """
        if self._spent is None:
            self._spent = self._reached()
        return self._spent

    def _reached(self) -> str | None:
        limits, now_s = self._limits, self._clock()
        if limits.target_loss is not None and self._lowest_loss <= limits.target_loss:
            return f"sweep.budget.target_loss = {limits.target_loss:g} is reached (eval loss {self._lowest_loss:.4f})"
        gpu_hours = (self._timeline.occupied_s(now_s) + self._elsewhere_s[0]) / HOUR_S
        wall_clock_hours = (self._timeline.elapsed_s(now_s) + self._elsewhere_s[1]) / HOUR_S
        if limits.gpu_hours is not None and gpu_hours >= limits.gpu_hours:
            return f"sweep.budget.gpu_hours = {limits.gpu_hours:g} is spent ({gpu_hours:.4g} hours of slots used)"
        if limits.wall_clock_hours is not None and wall_clock_hours >= limits.wall_clock_hours:
            return f"sweep.budget.wall_clock_hours = {limits.wall_clock_hours:g} is spent ({wall_clock_hours:.4g} hours)"
        return None
