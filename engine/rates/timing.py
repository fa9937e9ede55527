"""Time calls on a device, or on the host with a clock that tests replace.

Measuring functions take a `Timer` and never look at a clock themselves, so a test gives them one
that returns known seconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Protocol

import torch

# More than any card's L2 cache holds (H100: 50 MB, 5090: 96 MB): what a call reads comes from memory,
# as in a training step.
FLUSH_BYTES = 256 * 2**20
# One flush is 0.09 ms on an H100, and its host takes up to that long for a launch of Triton: with one
# flush, a norm of 35 us was measured at 84 us now and then.
FLUSHES = 3
WARM_UP, MOST_CALLS = 3, 30
Call = Callable[[], object]


class Timer(Protocol):
    """Return the median seconds of one call."""

    def __call__(self, call: Call) -> float: ...


class DeviceTimer:
    """Time calls by CUDA events, each after a flush of the L2 cache.

    The flushes also hide the launch: the device is busy with them while the host launches the call.
    """

    def __init__(self, device: torch.device, budget_s: float = 0.15) -> None:
        """Take the device. budget_s: about how long the calls of one measurement may take."""
        self._budget_s = budget_s
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, call: Call) -> float:
        for _ in range(WARM_UP):
            last = self._once(call)
        count = max(3, min(MOST_CALLS, int(self._budget_s / max(last, 1e-6))))
        events = [self._record(call) for _ in range(count)]
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) / 1e3 for start, end in events)

    def _once(self, call: Call) -> float:
        start, end = self._record(call)
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def _record(self, call: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(FLUSHES):
            self._flush.zero_()
        start.record()
        call()
        end.record()
        return start, end


class LoadTimer:
    """Time calls in a row on a device that has been busy with them, so that its clocks are those of training.

    An H100 computes steps in a row up to 5 % slower than a step after a pause.
    """

    def __init__(self, device: torch.device, load_s: float = 0.7, measured_s: float = 0.3) -> None:
        """Take the device, and how long the calls run before and while they are timed."""
        self._device, self._load_s, self._measured_s = device, load_s, measured_s

    def __call__(self, call: Call) -> float:
        call()
        once = self._mean(call, 2)
        self._mean(call, max(1, int(self._load_s / once)))
        return self._mean(call, max(2, int(self._measured_s / once)))

    def _mean(self, call: Call, count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize(self._device)
        return start.elapsed_time(end) / 1e3 / count


class HostTimer:
    """Time calls by the host's clock, from launch until the device is idle."""

    def __init__(self, synchronize: Call, clock: Callable[[], float] = time.perf_counter, calls: int = 7) -> None:
        """Take what waits for the device, the clock in seconds, and how many calls give the median."""
        self._synchronize, self._clock, self._calls = synchronize, clock, calls

    def __call__(self, call: Call) -> float:
        for _ in range(WARM_UP):
            call()
        seconds = []
        for _ in range(self._calls):
            self._synchronize()
            began = self._clock()
            call()
            self._synchronize()
            seconds.append(self._clock() - began)
        return statistics.median(seconds)
