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

from engine.system.announced_lock import AnnouncedLock, announcements, is_alive

NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
POLL_S, RETRY_S = 0.2, 0.02


class FileLock:
    """Let one process at a time hold the lock of a path. The file stays and is never written."""

    def __init__(self, path: Path) -> None:
        self._path, self._handle = path, -1
        self._without_flock = AnnouncedLock(path)

    @property
    def holder(self) -> Path | None:
        """Return the file that holds the lock, after acquire() has failed on a disk without flock."""
        return self._without_flock.holder

    def acquire(self, wait: bool = False, patience_s: float = 0.0) -> bool:
        """Try once, or wait for the holder, and return True if the lock is now held.

        patience_s: try again for so many seconds. Somebody may just have asked is_held(). OSError if
        the path is a link.
        """
        ends = time.monotonic() + patience_s
        while not (is_ours := self._try(wait)) and time.monotonic() < ends:
            time.sleep(RETRY_S)
        return is_ours

    def _try(self, wait: bool) -> bool:
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


def is_held(path: Path) -> bool:
    """Return whether a process holds the lock of a path. Nothing is written.

    The kernel's list of locks is read first, because that takes no lock. It holds the locks of this
    machine only. So a shared lock is tried for a moment, which the lock of a process on another node
    of a shared disk refuses. Any number of processes may ask at once. One that takes the lock in
    that moment may find it held: acquire(patience_s) tries again.
    """
    if any(is_alive(file) for file in announcements(path)):
        return True
    return _is_listed(path) or _refuses_to_share(path)


def _is_listed(path: Path) -> bool:
    try:
        inode, lines = os.stat(path).st_ino, Path("/proc/locks").read_text().splitlines()
    except OSError:
        return False
    # 1: FLOCK  ADVISORY  WRITE 4711 fe:00:1835 0 EOF
    fields = [line.split() for line in lines]
    exclusive = [each for each in fields if each[1] == "FLOCK" and each[3] == "WRITE"]
    return any(_holds(int(each[4]), path) for each in exclusive if each[5].split(":")[-1] == str(inode))


def _refuses_to_share(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def _holds(process: int, path: Path) -> bool:
    """Return whether the process has the file open; True if it may not be asked, as another user's."""
    opened = Path(f"/proc/{process}/fd")
    try:
        return any(os.path.samefile(each, path) for each in opened.iterdir() if each.exists())
    except FileNotFoundError:
        return opened.parent.exists()
    except PermissionError:
        return True
