"""What a sweep prints must not end it: the pipe or terminal it goes to may be gone long before the sweep is. No torch, no ray."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EDQUOT)  # no reader, no terminal any more, a log file on a full disk


class LastingStream:
    """A text stream that drops what it is given once nobody takes it."""

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
            with open(os.devnull, "w") as nowhere:  # else Python says at its end what it could not flush
                os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, sys.stdout and sys.stderr are such streams."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:  # for one that was closed before
        sys.stdout, sys.stderr = (LastingStream(stream or nowhere) for stream in before)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before
