"""Lock a file where the file system has no flock, as Lustre mounted without it.

Each process announces itself in a file next to the lock, then looks for others. Two that see each
other both step back, so at most one holds the lock. The file's name says which process it belongs
to. The next process removes the file of one that has died on this machine, so SIGKILL leaves no lock
behind. It cannot ask another machine, so a file from there counts until someone removes it.
"""

from __future__ import annotations

import hashlib
import os
import random
import secrets
import socket
import time
from pathlib import Path

MARK = ".held-"  # between the lock's name and its owner's
TRIES, PAUSE_S = 4, 0.05  # two that step back must not meet again
BOOT, PID_NAMES, MACHINE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid"), Path("/etc/machine-id")


class AnnouncedLock:
    """Let one process at a time hold the lock of a path."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._own: Path | None = None
        self.holder: Path | None = None
        """The other process's file, after acquire() has returned False."""

    def acquire(self) -> bool:
        """Try to get the lock, and return True if it is now held."""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(random.uniform(PAUSE_S, 3 * PAUSE_S))
            self._announce()
            self.holder = self._find_other()
            if self.holder is None:
                return True
            self.release()
        return False

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self._own is not None:
            self._own.unlink(missing_ok=True)
            self._own = None

    def _announce(self) -> None:
        pid = os.getpid()
        name = f"{self._path.name}{MARK}{_machine()}-{_boot()}-{pid}-{_started(pid)}-{secrets.token_hex(4)}"
        own = self._path.with_name(name)
        os.close(os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
        self._own = own

    def _find_other(self) -> Path | None:
        """Return the file of another process that may hold the lock; remove files of dead ones."""
        for other in announcements(self._path):
            if other != self._own:
                if is_alive(other):
                    return other
                other.unlink(missing_ok=True)
        return None


def announcements(path: Path) -> list[Path]:
    """Return the files of all who hold the lock of a path without flock, or try to."""
    try:
        return [path.with_name(name) for name in sorted(os.listdir(path.parent)) if name.startswith(f"{path.name}{MARK}")]
    except FileNotFoundError:
        return []


def is_alive(announcement: Path) -> bool:
    """Return False if the file's process has certainly ended; one of another machine may live."""
    parts = announcement.name.rpartition(MARK)[2].split("-")
    if len(parts) != 5 or not parts[2].isdigit():
        return True
    machine, boot, pid, started, _ = parts
    if boot == _boot():
        return _started(int(pid)) == started
    # the machine has booted since; another container of it has the same boot and other process names
    return machine != _machine() or boot.split(".")[0] == _boot().split(".")[0]


def _machine() -> str:
    """Return a name of this machine that survives a boot."""
    known = MACHINE.read_text() if MACHINE.is_file() else ""
    return hashlib.sha256(f"{socket.gethostname()}\n{known}".encode()).hexdigest()[:12]


def _boot() -> str:
    """Return the machine's boot, and the space in which process ids have a meaning."""
    boot = BOOT.read_text().strip().replace("-", "")[:16] if BOOT.is_file() else _machine()
    try:
        return f"{boot}.{PID_NAMES.stat().st_ino}"
    except OSError:
        return f"{boot}.0"


def _started(pid: int) -> str:
    """Return when the process started, in ticks since the boot; `gone` if it has ended.

    A process id alone may belong to a later process.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "gone"
    return "gone" if fields[0] in "ZX" else fields[19]
