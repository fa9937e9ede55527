"""Handle signals for the length of a block."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

SIGACTION_BYTES = 1024  # more than the structure has on any system


@contextmanager
def handled(numbers: Iterable[int], handler: Callable[[int, Any], None]) -> Iterator[Callable[[], None]]:
    """Let `handler` take these signals inside the block.

    Yield a function that restores the earlier handlers, so that a second signal can act at once.
    """
    before = {number: signal.getsignal(number) for number in numbers}

    def give_back() -> None:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)

    for number in before:
        signal.signal(number, handler)
    try:
        yield give_back
    finally:
        give_back()


@contextmanager
def handler_kept(number: int) -> Iterator[None]:
    """Keep this process's handler of a signal, though a library installs its own inside the block.

    Works in any thread, where Python's own `signal.signal` works in the main thread alone.
    """
    library = ctypes.CDLL(None)
    kept = ctypes.create_string_buffer(SIGACTION_BYTES)
    library.sigaction(number, None, kept)
    try:
        yield
    finally:
        library.sigaction(number, kept, None)
