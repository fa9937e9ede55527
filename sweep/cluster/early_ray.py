"""Start the sweep's own Ray in a thread while another process prepares model and data.

The thread lives as long as its Ray. Linux ends Ray's processes with the thread that started them, so
they also end with a driver that is killed.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from engine.system.signals import handled, handler_kept

if TYPE_CHECKING:
    import psutil

    from sweep.cluster.slots import Slots  # loads the config's classes, which --help need not wait for

PREPARED_SOON_S = 1.0
IDLE_ENDS_S = 0.05  # a thread with nothing to do takes less to end
RAYS_OWN = ("gcs_server", "raylet")  # the processes that the thread starts, and everything below them


@dataclass(frozen=True)
class OwnRay:
    """Say what a Ray of the sweep's own serves.

    modules: what each worker process loads before it has a trial; none: it starts with its trial.
    """

    slots: Slots
    modules: tuple[str, ...] = ()


class EarlyRay:
    """Start Ray, then load libraries, in a thread inside the block. `take` hands Ray over.

    A Ray that nobody took is shut down by the thread itself after the block. No one waits for that:
    a refusal is printed at once, and `end_process` ends the rest. Where Ray does not start, no error
    is raised: whoever needs Ray starts it again, and meets the error.
    """

    def __init__(
        self, wanted: OwnRay | None, load_ray: Callable[[], tuple[Callable[[OwnRay], None], Callable[[], None]]],
        load: Callable[[], object],
    ) -> None:  # fmt: skip
        """Take functions that run in the thread.

        wanted: the Ray to start, None for none. load_ray: imports ray, and returns functions that
        start and stop it. load: imports what else the sweep needs.
        """
        self._wanted, self._load_ray, self._load = wanted, load_ray, load
        self._is_prepared, self._is_settled, self._is_left = threading.Event(), threading.Event(), threading.Event()
        self._is_up = self._is_taken = False
        self.ending: list[psutil.Process] = []  # while Ray ends, no one else finds those whose parent has ended
        self._messages = _HeldMessages()
        self._thread = threading.Thread(target=self._keep, name="early-ray")
        self._before: EarlyRay | None = None

    def __enter__(self) -> EarlyRay:
        global _newest
        self._before, _newest = _newest, self
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.leave()

    def prepared(self) -> None:
        """Say that the preparation is over. Within PREPARED_SOON_S, nothing is loaded early."""
        self._is_prepared.set()

    def leave(self) -> None:
        """Let the thread end, without waiting for it."""
        self._is_left.set()
        self._is_prepared.set()

    def take(self, wanted: OwnRay) -> bool:
        """Return whether the wanted Ray runs. The caller then shuts it down, and calls `leave` after that.

        It waits for a Ray that is about to start, and for the end of a Ray that is not wanted.
        """
        self._is_prepared.set()
        self._is_settled.wait()
        if self._is_up and not self._is_left.is_set() and wanted == self._wanted:
            self._messages.pass_on()
            self._is_taken = True
            return True
        self.leave()
        self._thread.join()
        return False

    def is_busy(self) -> bool:
        """Return whether the thread still starts or ends a Ray that nobody took, or loads libraries, after `leave`."""
        self._thread.join(0.0 if self._is_taken else IDLE_ENDS_S)
        return self._thread.is_alive() and not self._is_taken

    def _keep(self) -> None:
        is_soon = self._is_prepared.wait(PREPARED_SOON_S)
        try:
            if not is_soon:
                self._bring_up()
        except BaseException:
            self._end()  # it may have started in part
        finally:
            self._is_settled.set()
        if not (is_soon or self._is_left.is_set()):
            with suppress(Exception):
                self._load()
        self._is_left.wait()
        if self._is_up and not self._is_taken:
            self._end()

    def _bring_up(self) -> None:
        if self._before is not None:
            self._before._thread.join()  # one Ray at a time in a process
        if self._wanted is None or self._is_left.is_set():
            return
        start, self._stop = self._load_ray()
        self._messages.hold()
        with handler_kept(signal.SIGTERM):  # Ray's own prints where each thread is
            start(self._wanted)
        self._is_up = True

    def _end(self) -> None:
        try:
            if self._messages.are_held:
                self.ending = _rays_processes()
                with suppress(Exception), handler_kept(signal.SIGTERM):
                    self._stop()
        finally:
            self._messages.drop()


_newest: EarlyRay | None = None


def take_early_ray(wanted: OwnRay) -> bool:
    """Return whether the wanted Ray was started early and is the caller's now; see `EarlyRay.take`."""
    return _newest is not None and _newest.take(wanted)


def leave_early_ray() -> None:
    """Let an early Ray end that is not wanted, or was shut down."""
    if _newest is not None:
        _newest.leave()


def end_process(code: int) -> NoReturn:
    """End the process with this exit code, and with it an early Ray that nobody took.

    Python would wait until that Ray has started and ended, for seconds, and a second Ctrl-C would
    show a traceback.
    """
    with handled((signal.SIGINT,), lambda number, frame: None):  # that second Ctrl-C may come now
        if _newest is not None and _newest.is_busy():
            _end_at_once(code, _newest.ending)
    sys.exit(code)


def _end_at_once(code: int, ending: list[psutil.Process]) -> NoReturn:
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):  # its reader is gone, or it is closed
            stream.flush()
    for process in [*_rays_processes(), *ending]:
        with suppress(Exception):
            process.kill()
    os._exit(code)


def _rays_processes() -> list[psutil.Process]:
    import psutil  # has been loaded with ray, if there is one

    found = []
    with suppress(psutil.Error):
        for child in psutil.Process().children():
            if child.name() in RAYS_OWN:
                found += [child, *child.children(recursive=True)]
    return found


class _HeldMessages(logging.Handler):
    """Keep Ray's log messages off the terminal until there is a file for them."""

    def __init__(self) -> None:
        super().__init__()
        self._records: list[logging.LogRecord] = []
        self.are_held = False

    def hold(self) -> None:
        for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "ray"]:
            logger = logging.getLogger(name)
            logger.handlers.clear()
            logger.propagate = True
        logging.getLogger("ray").setLevel(logging.INFO)
        logging.getLogger().addHandler(self)
        self.are_held = True

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.split(".")[0] == "ray":
            self._records.append(record)
        elif logging.getLogger().handlers == [self] and record.levelno >= logging.lastResort.level:
            logging.lastResort.handle(record)  # as if this handler were not there

    def pass_on(self) -> None:
        """Give the messages to the handlers that there are now."""
        self.drop()
        for record in self._records:
            logging.getLogger().handle(record)

    def drop(self) -> None:
        logging.getLogger().removeHandler(self)
