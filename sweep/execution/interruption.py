"""Ask a trial to end between two reports.

SIGTERM to its process asks one trial, and so does a note in its folder. A stop file that the driver
creates asks all of them. The trial finishes its step, saves and releases its slot. It later
continues from there, and the sweep counts no death.

Such a file reaches every node, because the sweep folder is shared. A Ray call would not do: a
busy worker takes none.
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

# sent by Ctrl-C; by `kill` and schedulers; by a terminal that closes
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# looking for the stop file takes microseconds on a local disk, but a round trip on a shared one
LOOK_EVERY_S = 0.2


class Interruption:
    """Tell one worker process when its trial must end."""

    def __init__(self, when_idle: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        """Take the callback for a SIGTERM that arrives when there is nothing to save.

        when_idle: runs in the main thread, before the process ends.
        """
        self.is_terminated = False
        self._when_idle, self._clock = when_idle, clock
        self._is_working = self._is_training = self._is_asked = False
        self._note: Path | None = None  # of the trial that is in training
        self._files: tuple[Path, ...] = ()
        self._looked_s = float("-inf")

    def listen(self) -> None:
        """Handle SIGTERM from now on. The driver starts workers with it blocked (see tuner.py)."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._terminate)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def follow(self, *files: Path) -> None:
        """Watch the driver's files that ask a trial to end, for a new trial."""
        self._files, self._looked_s, self._is_asked = files, float("-inf"), False

    def is_asked(self) -> bool:
        """Return whether the trial must end now. The engine may ask at every step."""
        now_s = self._clock()
        if not self._is_asked and now_s - self._looked_s >= LOOK_EVERY_S:
            self._looked_s, self._is_asked = now_s, any(file.exists() for file in self._files)
        return self._is_asked or self.is_terminated

    @contextmanager
    def working(self) -> Iterator[None]:
        """Mark a step of the worker: inside, SIGTERM waits for a training step to end.

        Between two steps a trial has nothing to save, and it may go on in another worker.
        """
        self._is_working = True
        if self._note is not None:
            self._note.touch()
        try:
            yield
        finally:
            self._is_working = False
            if self._note is not None:
                self._note.unlink(missing_ok=True)

    @contextmanager
    def training(self, trial_folder: Path) -> Iterator[None]:
        """Mark the training part: inside, a stop waits for this trial to save.

        Before that there is nothing to save, so a stop does not wait. Loading libraries and model
        can outlast the notice that a machine gives before it shuts down. If the process is killed,
        its leftover note makes the next stop wait the full grace period once.
        """
        note = self._note = trial_folder / TRAINING
        note.touch()
        self._is_training, was_working = True, self._is_working
        try:
            yield
        finally:
            self._is_training, self._note = False, None
            if self._is_working or not was_working:  # else the note, if there is one, is another worker's
                note.unlink(missing_ok=True)

    def _terminate(self, number: int, frame: Any) -> None:
        self.is_terminated = True
        if not (self._is_working and self._is_training):
            self._when_idle()
            raise SystemExit(128 + number)


def taken_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that ask a driver to end, without SIGHUP if nohup ignores it."""
    is_immune = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if not (is_immune and number == signal.SIGHUP))
