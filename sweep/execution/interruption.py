"""How a trial is asked to end between two reports: by SIGTERM to its process, or by a file that the driver makes for all trials.

The trial finishes its step, saves, and gives its slot back; it goes on from there, and nothing is held against it. By a file,
because it reaches every node (the sweep folder is shared), and a worker at work takes no calls. No torch, no ray.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sweep.folder.notes import TRAINING

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C; `kill` and schedulers; a terminal that is closed
LOOK_EVERY_S = 0.2  # a look at the file takes microseconds on a local disk, and a round trip on a shared one


class Interruption:
    """Of one worker process."""

    def __init__(self, when_idle: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        """when_idle: SIGTERM comes while there is nothing to save; called in the main thread, before the process ends."""
        self.is_terminated = False
        self._when_idle, self._clock = when_idle, clock
        self._is_working = self._is_training = self._is_asked = False
        self._file, self._looked_s = Path(), float("-inf")

    def listen(self) -> None:
        """Take SIGTERM from now on, also where the process was started with it blocked (see tuning.py)."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._terminate)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def follow(self, stop_file: Path) -> None:
        """The file by which the driver asks."""
        self._file, self._looked_s, self._is_asked = stop_file, float("-inf"), False

    def is_asked(self) -> bool:
        """Whether the trial must end now; cheap enough to be asked at every step."""
        now_s = self._clock()
        if not self._is_asked and now_s - self._looked_s >= LOOK_EVERY_S:
            self._looked_s, self._is_asked = now_s, self._file.exists()
        return self._is_asked or self.is_terminated

    @contextmanager
    def working(self) -> Iterator[None]:
        """Inside, SIGTERM waits for the end of the step, where one is trained."""
        self._is_working = True
        try:
            yield
        finally:
            self._is_working = False

    @contextmanager
    def training(self, trial_folder: Path) -> Iterator[None]:
        """Inside, an end waits for the trial, the driver's too. Before, its process loads libraries and model: it has nothing to
        save, and would take longer than a machine has that is about to go. A note that a killed one leaves costs a later end its
        grace."""
        note = trial_folder / TRAINING
        note.touch()
        self._is_training = True
        try:
            yield
        finally:
            self._is_training = False
            note.unlink(missing_ok=True)

    def _terminate(self, number: int, frame: Any) -> None:
        self.is_terminated = True
        if not (self._is_working and self._is_training):
            self._when_idle()
            raise SystemExit(128 + number)


def taken_signals() -> tuple[signal.Signals, ...]:
    """Those by which a driver is asked to end; not SIGHUP under nohup, which ignores it."""
    is_immune = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if not (is_immune and number == signal.SIGHUP))
