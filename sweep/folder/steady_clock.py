"""Tell the time so that a duration is right even if someone sets the machine's clock meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable


def since_boot() -> float:
    """Return seconds that no one can set. They include the time in which the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class SteadyClock:
    """Return Unix seconds as they were at the start, plus the seconds since then."""

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = since_boot) -> None:
        self._steady, self._offset_s = steady, wall() - steady()

    def __call__(self) -> float:
        return self._offset_s + self._steady()
