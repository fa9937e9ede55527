"""Handle signals for the length of a block."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


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
