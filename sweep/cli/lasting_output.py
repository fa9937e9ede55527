"""Keep a sweep running after its output has nowhere to go.

The pipe or terminal that it prints to may close long before the sweep ends.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# the reader is gone, the terminal is gone, the log file's disk or quota is full
GONE = (errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EDQUOT)


class LastingStream:
    """Pass text on to a stream, and drop it once the stream can no longer take it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._is_gone = stream, False

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, act: Any) -> None:
        if self._is_gone:
            return
        try:
            act()
        except OSError as error:
            if error.errno not in GONE:
                raise
            self._is_gone = True
            # else Python complains at its exit about text that it cannot flush
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def lasting_output() -> Iterator[None]:
    """Make sys.stdout and sys.stderr lasting streams inside the block."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:  # replaces a stream that was closed before
        sys.stdout, sys.stderr = (LastingStream(stream or nowhere) for stream in before)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before
