"""Lock a file exclusively with flock, or without it where the file system has none.

The kernel frees the lock when the process dies, so a kill leaves nothing to clean up.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.system.announced_lock import AnnouncedLock

NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
POLL_S = 0.2


class FileLock:
    """Let one process at a time hold the lock of a path. The file stays and is never written."""

    def __init__(self, path: Path) -> None:
        self._path, self._handle = path, -1
        self._without_flock = AnnouncedLock(path)

    @property
    def holder(self) -> Path | None:
        """Return the file that holds the lock, after acquire() has failed on a disk without flock."""
        return self._without_flock.holder

    def acquire(self, wait: bool = False) -> bool:
        """Try once, or wait for the holder, and return True if the lock is now held.

        OSError if the path is a link.
        """
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            os.close(handle)
            if isinstance(error, BlockingIOError):
                return False
            if error.errno not in NO_FLOCK:
                raise
            return self._acquire_without_flock(wait)
        self._handle = handle
        return True

    def _acquire_without_flock(self, wait: bool) -> bool:
        while not self._without_flock.acquire():
            if not wait:
                return False
            time.sleep(POLL_S)
        return True

    def release(self) -> None:
        """Release the lock, if it is held."""
        self._without_flock.release()
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
