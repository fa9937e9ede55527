"""Call a function in a child process with limits on time and memory.

A chat template from elsewhere is a program. Its sandbox keeps it away from the machine, but not
from `'a' * 10 ** 10` or three nested ranges. Neither a signal nor a thread can stop a power of
large numbers, so it runs in a process that can be killed.

The child is forked, so the function and the tokenizer it holds need not be sent. It does nothing
but call the function.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
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

LIMIT_S, LIMIT_GIB = 30.0, 1.0  # per call; a chat of 100,000 words needs milliseconds and megabytes
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
NEW_OBJECTS = 50_000  # between two looks for garbage in circles; a call makes little of it


class TooCostly(Exception):
    """Report that the call exceeded its time or memory; the text is one line."""


class Bounded:
    """Call a function with limits: `with Bounded(function) as call: call(argument)`.

    Arguments, results and exceptions are pickled, and the call raises the function's exceptions.
    TooCostly if it exceeds a limit.
    """

    def __init__(self, function: Callable[[Any], Any], limit_s: float = LIMIT_S, limit_gib: float = LIMIT_GIB) -> None:
        """Set the limits of each call.

        limit_s: seconds. limit_gib: memory on top of this process's memory at the first call; Linux
        only.
        """
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
            raise TooCostly("crashed its process") from None
        except BaseException:  # the next call must not read a late answer to this one
            self.close()
            raise
        if not worked:
            raise value
        return value

    def close(self) -> None:
        """Kill the child."""
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
    """Answer calls in the child until the caller closes the pipe or dies."""
    other_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller handles Ctrl-C
    with contextlib.suppress(OSError, AttributeError):
        # So that a killed caller leaves no endless loop behind (Linux).
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    gc.freeze()  # what the caller made stays shared with it, and is not searched again and again
    gc.set_threshold(NEW_OBJECTS)
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
    """Limit the address space to `gib` on top of what is mapped already.

    Without /proc no limit is known to work, so there only the time is limited.
    """
    with contextlib.suppress(OSError, ValueError):
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = mapped + int(gib * GIB)
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
