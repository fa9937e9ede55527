"""A lock lets in one holder at a time, and outlives no holder, with flock and without it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from engine.system import announced_lock, file_lock
from engine.system.file_lock import NO_FLOCK, FileLock, is_held

HOLDER = """
import errno, fcntl, os, pathlib, sys, time
def none(handle, flags):
    raise OSError(errno.ENOSYS, "Function not implemented")
if sys.argv[2] == "none":
    fcntl.flock = none
from engine.system.file_lock import FileLock
lock = FileLock(pathlib.Path(sys.argv[1]))
print(lock.acquire(), flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["flock", "none"])
def kind(request, monkeypatch):
    if request.param == "none":
        take_flock_away(monkeypatch, errno.ENOSYS)
    return request.param


def take_flock_away(monkeypatch, number):
    def flock(handle, flags):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_second_holder_waits_for_the_first_in_one_process_and_between_two(tmp_path, kind):
    path = tmp_path / "lock"
    first, second = FileLock(path), FileLock(path)
    assert first.acquire() and not second.acquire()
    process = subprocess.run([sys.executable, "-c", HOLDER.replace("60", "0"), path, kind], capture_output=True, text=True)
    assert process.stdout == "False\n", process.stderr
    first.release()
    assert second.acquire()
    second.release()
    assert {file.name for file in tmp_path.iterdir()} == {"lock"}  # nothing is left next to it


def test_a_killed_holder_leaves_the_lock_free_even_before_its_parent_has_noticed(tmp_path, kind):
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, path, kind], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "True\n"
    lock = FileLock(path)
    assert not lock.acquire()  # twin: it was held
    holder.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not (taken := lock.acquire()) and time.monotonic() < deadline:
        time.sleep(0.02)  # the kernel still ends it; no one has waited for it, so it is a zombie
    holder.wait()
    assert taken


def test_many_threads_are_inside_one_at_a_time(tmp_path, kind):
    inside, most, done = [], [], []

    def work():
        for _ in range(3):
            with FileLock(tmp_path / "lock").held():
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.002)
                inside.pop()
        done.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (set(most), len(done)) == ({1}, 3)


@pytest.mark.parametrize("number", sorted(set(NO_FLOCK)))
def test_each_way_to_have_no_flock_is_known(tmp_path, monkeypatch, number):
    take_flock_away(monkeypatch, number)
    assert FileLock(tmp_path / "lock").acquire() and not FileLock(tmp_path / "lock").acquire()


def test_another_fault_of_flock_is_raised(tmp_path, monkeypatch):
    take_flock_away(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        FileLock(tmp_path / "lock").acquire()


@pytest.fixture(params=["same machine", "another node"])
def asked_from(request, monkeypatch):
    """Without the kernel's list, as for a lock of another node, the shared lock alone tells."""
    if request.param == "another node":
        monkeypatch.setattr(file_lock, "_is_listed", lambda path: False)


def test_a_held_lock_is_seen_and_a_free_one_is_not(tmp_path, kind, asked_from):
    path, lock = tmp_path / "lock", FileLock(tmp_path / "lock")
    assert not is_held(path) and not path.exists()
    path.touch()
    assert not is_held(path)
    assert lock.acquire() and is_held(path)
    lock.release()
    assert not is_held(path) and {file.name for file in tmp_path.iterdir()} == {"lock"}


def test_those_who_ask_at_once_do_not_take_each_other_for_a_holder(tmp_path, asked_from):
    path = tmp_path / "lock"
    with path.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # another process is in the middle of asking
        assert not is_held(path)
    found, asked = [], threading.Barrier(4)

    def ask():
        asked.wait(10)
        found.extend(is_held(path) for _ in range(200))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 800 and not any(found)


def test_a_lock_is_taken_although_somebody_asks_in_that_moment(tmp_path):
    path = tmp_path / "lock"
    with path.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not FileLock(path).acquire()  # twin: without patience it is in the way
        threading.Timer(0.1, fcntl.flock, (other, fcntl.LOCK_UN)).start()
        lock = FileLock(path)
        assert lock.acquire(patience_s=10.0)
    began = time.monotonic()
    assert not FileLock(path).acquire(patience_s=0.1) and 0.1 <= time.monotonic() - began < 5.0  # a real holder stays
    lock.release()


def test_the_announcement_of_a_dead_process_holds_nothing(tmp_path):
    machine, boot = announced_lock._machine(), announced_lock._boot()
    other = tmp_path / f"lock.held-{machine}-{boot}-{os.getpid()}-12-abcd0123"
    other.touch()
    assert not is_held(tmp_path / "lock") and other.exists()  # nothing is removed
    other.rename(tmp_path / f"lock.held-fedcba987654-0123456789abcdef.1-{os.getpid()}-12-abcd0123")
    assert is_held(tmp_path / "lock")  # another machine's may live


@pytest.mark.parametrize(
    ("machine", "boot", "pid", "is_free"),
    [
        ("other", "0123456789abcdef.1", 1, False),  # another machine: nobody here knows whether it lives
        ("own", "0123456789abcdef.1", 1, True),  # this machine has booted since
        ("own", "own boot.1", "own", False),  # another container of this machine
        ("own", "own", "own", True),  # this process id, but of an earlier process
    ],
)
def test_whose_announcement_counts(tmp_path, monkeypatch, machine, boot, pid, is_free):
    take_flock_away(monkeypatch, errno.ENOSYS)
    own_machine, own_boot = announced_lock._machine(), announced_lock._boot()
    boot = {"own": own_boot, "own boot.1": f"{own_boot.split('.')[0]}.1"}.get(boot, boot)
    pid = os.getpid() if pid == "own" else pid
    other = tmp_path / f"lock.held-{own_machine if machine == 'own' else 'fedcba987654'}-{boot}-{pid}-12-abcd0123"
    other.touch()
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire() is is_free
    assert other.exists() is not is_free
    assert lock.holder == (None if is_free else other)  # so that a message can name it
