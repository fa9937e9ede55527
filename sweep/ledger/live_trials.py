"""Track the trials that hold a slot or wait for one, and when each last started or reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sweep.folder.notes import is_training
from sweep.folder.sweep_folder import SweepFolder


class LiveTrials:
    """Hold the live trials by number.

    report_timeout_s: seconds that a trial may be silent, None for no limit. monotonic: returns
    seconds on a clock.
    """

    def __init__(self, report_timeout_s: float | None, monotonic: Callable[[], float]) -> None:
        self.report_timeout_s, self._monotonic = report_timeout_s, monotonic
        self._heard_s: dict[int, float] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._heard_s

    def __iter__(self) -> Iterator[int]:
        return iter(self._heard_s)

    def __len__(self) -> int:
        return len(self._heard_s)

    def heard_of(self, number: int) -> None:
        """Note that the trial has started or reported just now."""
        self._heard_s[number] = self._monotonic()

    def remove(self, number: int) -> bool:
        """Remove a trial. Returns whether it was there."""
        return self._heard_s.pop(number, None) is not None

    def still_waits(self, number: int) -> None:
        """Restart the time of a trial that has no slot yet: its silence means nothing."""
        if number in self._heard_s:
            self.heard_of(number)

    def num_training(self, folder: SweepFolder) -> int:
        """Count the trials that may have something to save. A stop waits for them."""
        return sum(is_training(folder.trial(number)) for number in self._heard_s)

    def is_silent(self, number: int) -> bool:
        """Return whether the trial has been silent for longer than report_timeout_s."""
        heard_s = self._heard_s.get(number)
        return None not in (heard_s, self.report_timeout_s) and self._monotonic() - heard_s > self.report_timeout_s
