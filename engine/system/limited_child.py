"""A function called in a child process that may take so much time and memory: for what a file from elsewhere computes.

A chat template is a program. Its sandbox keeps it from the machine, not from `'a' * 10 ** 10` or three nested ranges, and neither
a signal nor a thread ends a power of large numbers. So it runs in a process that can be killed. Forked: the function, with the
tokenizer it holds, need not be sent; the child does nothing but call it.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from engine.units import GIB

LIMIT_S, LIMIT_GIB = 30.0, 1.0  # of one call; a chat of 100,000 words takes milliseconds and megabytes
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class TooCostly(Exception):
    """The call took more time or memory than it may. Its text is one line, to follow the name of what was called."""


class Bounded:
    """`with Bounded(function) as call: call(argument)`. What the function raises, the call raises. Both ways are pickled."""

    def __init__(self, function: Callable[[Any], Any], limit_s: float = LIMIT_S, limit_gib: float = LIMIT_GIB) -> None:
        """limit_s: of one call; limit_gib: of memory beyond what this process has now, where the system can bound it (Linux)."""
        self._function, self._limit_s, self._limit_gib = function, limit_s, limit_gib
        self._child: Any = None
        self._connection: Connection | None = None

    def __enter__(self) -> Bounded:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __call__(self, argument: Any) -> Any:
        if self._child is None:
            self._start()
        try:
            self._connection.send(argument)
            if not self._connection.poll(self._limit_s):
                raise TooCostly(f"takes more than {self._limit_s:g} s")
            worked, value = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.close()
            raise TooCostly("ended its process") from None
        except BaseException:  # what comes next must not read a late answer to this
            self.close()
            raise
        if not worked:
            raise value
        return value

    def close(self) -> None:
        """End the child, whatever it is doing."""
        if self._child is not None:
            self._child.kill()
            self._child.join()
            self._connection.close()
            self._child = None

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        arguments = (self._connection, self._function, self._limit_gib)
        self._child = context.Process(target=_serve, args=(theirs, *arguments), daemon=True)
        self._child.start()
        theirs.close()


def _serve(connection: Connection, other_end: Connection, function: Callable[[Any], Any], limit_gib: float) -> None:
    """The child: until the pipe is closed. A caller that was killed closes it too."""
    other_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to hear
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)  # a caller that is killed leaves no endless loop behind (Linux)
    _limit_memory(limit_gib)
    too_large = TooCostly(f"needs more than {limit_gib:g} GiB of memory")
    while True:
        try:
            argument = connection.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = (True, function(argument))
        except MemoryError:
            answer = (False, too_large)
        except Exception as error:
            answer = (False, error)
        try:
            connection.send(answer)
        except MemoryError:
            connection.send((False, too_large))


def _limit_memory(gib: float) -> None:
    """Address space beyond what is mapped already. Without /proc no limit is known to work; there, time alone is bounded."""
    with contextlib.suppress(OSError, ValueError):
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = mapped + int(gib * GIB)
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
