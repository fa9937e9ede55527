"""Lock a file exclusively with flock.

The kernel frees the lock when the process dies, so a kill leaves nothing to clean up.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FileLock:
    """Let one process at a time hold the lock of a path. The file stays and is never written."""

    def __init__(self, path: Path) -> None:
        self._path, self._handle = path, -1

    def acquire(self, wait: bool = False) -> bool:
        """Try once, or wait for the holder, and return True if the lock is now held.

        OSError if the path is a link.
        """
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            return False
        self._handle = handle
        return True

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait for the lock and hold it inside the block."""
        self.acquire(wait=True)
        try:
            yield
        finally:
            self.release()
