"""Ray starts in a thread while another process prepares, and whoever needs it takes it over."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest

from engine.system.child_python import own_environment
from sweep.cluster import early_ray
from sweep.cluster.early_ray import EarlyRay, OwnRay, leave_early_ray, take_early_ray
from sweep.cluster.slots import Slots

WANTED = OwnRay(Slots(2, "cpu", 1), ("module",))
WAIT_S = 20.0


class Recorded:
    """Stand in for Ray: note in which order it is loaded, started and stopped."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.events: list[str] = []
        self.may_start, self.is_stopped = threading.Event(), threading.Event()
        self.may_start.set()
        self.fault = fault

    def load(self) -> None:
        self.events.append("load")

    def start(self, wanted: OwnRay) -> None:
        self.events.append("begin")
        assert self.may_start.wait(WAIT_S)
        logging.getLogger("ray.fake").warning("Ray's own words")
        logging.getLogger("theirs").warning("another's words")
        self.events.append(f"start {wanted.slots.num_slots}")
        if self.fault:
            raise self.fault

    def stop(self) -> None:
        self.events.append("stop")
        self.is_stopped.set()

    def early(self, wanted: OwnRay | None = WANTED) -> EarlyRay:
        return EarlyRay(wanted, lambda: (self.start, self.stop), self.load)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(early_ray, "PREPARED_SOON_S", 0.01)
    yield
    leave_early_ray()


def wait_for(events: list[str], length: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while len(events) < length and time.monotonic() < deadline:
        time.sleep(0.005)


def test_the_run_takes_the_ray_that_was_started_early_and_ends_it_itself(caplog):
    ray = Recorded()
    with ray.early() as early:
        wait_for(ray.events, 3)
        early.prepared()
        caplog.clear()
        assert take_early_ray(WANTED)
        assert caplog.messages == ["Ray's own words"]  # held back so far, and now in the sweep's log
        leave_early_ray()
        assert not take_early_ray(WANTED)  # one run only
    assert ray.events == ["begin", "start 2", "load"]


def test_a_ray_with_other_slots_is_ended_before_the_wanted_one_may_start():
    ray = Recorded()
    with ray.early():
        wait_for(ray.events, 3)
        assert not take_early_ray(OwnRay(Slots(1, "cpu", 1), ("module",)))
        assert ray.events == ["begin", "start 2", "load", "stop"]


def test_a_refusal_waits_for_no_ray_and_leaves_none():
    ray = Recorded()
    ray.may_start.clear()
    with pytest.raises(ValueError, match="refused"), ray.early():
        wait_for(ray.events, 1)
        raise ValueError("refused")
    assert "stop" not in ray.events  # the line is printed now, while Ray still starts
    ray.may_start.set()
    assert ray.is_stopped.wait(WAIT_S)
    assert ray.events == ["begin", "start 2", "stop"]


def test_a_preparation_that_ends_soon_loads_nothing(monkeypatch):
    monkeypatch.setattr(early_ray, "PREPARED_SOON_S", WAIT_S)
    ray = Recorded()
    with ray.early() as early:
        early.prepared()
        assert not take_early_ray(WANTED)
    assert ray.events == []


def test_a_ray_that_does_not_start_is_ended_and_left_to_the_run():
    ray = Recorded(RuntimeError("no port"))
    with ray.early():
        wait_for(ray.events, 4)
        assert not take_early_ray(WANTED)
    assert ray.events == ["begin", "start 2", "stop", "load"]


def test_a_joined_cluster_loads_libraries_and_starts_no_ray():
    ray = Recorded()
    with ray.early(None):
        wait_for(ray.events, 1)
    assert ray.events == ["load"]


def test_a_second_sweep_of_a_process_starts_its_ray_after_the_first_has_ended():
    first, second = Recorded(), Recorded()
    first.may_start.clear()
    with first.early():
        wait_for(first.events, 1)
    with second.early():
        time.sleep(0.1)
        assert second.events == []
        first.may_start.set()
        assert take_early_ray(WANTED)
    assert first.events == ["begin", "start 2", "stop"] and second.events[:2] == ["begin", "start 2"]


def test_words_of_others_still_reach_the_terminal_while_rays_are_held(capsys, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    ray = Recorded()
    with ray.early():
        wait_for(ray.events, 2)
    assert capsys.readouterr().err == "another's words\n"


@pytest.mark.parametrize(("start_s", "stop_s"), [(60, 0), (0, 60)])
def test_the_process_ends_at_once_with_its_code_and_with_rays_processes(tmp_path, start_s, stop_s):
    """Else a second Ctrl-C would show a traceback, while Python waits for the thread."""
    script = f"""
import os, signal, subprocess, threading, time
from pathlib import Path
from sweep.cluster import early_ray
from sweep.cluster.early_ray import EarlyRay, OwnRay, end_process
early_ray.PREPARED_SOON_S = 0.01
up = threading.Event()
stopping = threading.Event()
def start(wanted):
    global raylet
    raylet = subprocess.Popen(["./raylet", "-c", "sleep 60 & echo $! > pid; wait"])
    while not Path("pid").exists() or not Path("pid").read_text():
        time.sleep(0.01)
    up.set()
    time.sleep({start_s})
def stop():
    raylet.kill()
    raylet.wait()
    stopping.set()
    time.sleep({stop_s})
with EarlyRay(OwnRay(None), lambda: (start, stop), lambda: None) as early:
    assert up.wait(20)
assert {start_s} or stopping.wait(20)
print("refused")
find = early_ray._rays_processes
def find_after_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)
    return find()
early_ray._rays_processes = find_after_ctrl_c
end_process(2)
"""
    (tmp_path / "raylet").symlink_to("/bin/bash")
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=own_environment(), capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (2, "refused\n", "")
    with suppress(psutil.NoSuchProcess):
        child, deadline = psutil.Process(int((tmp_path / "pid").read_text())), time.monotonic() + WAIT_S
        while child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_process_whose_early_ray_has_nothing_to_do_ends_as_ever(monkeypatch):
    monkeypatch.setattr(early_ray, "IDLE_ENDS_S", WAIT_S)
    with Recorded().early(None):
        pass
    with pytest.raises(SystemExit) as ended:
        early_ray.end_process(3)
    assert ended.value.code == 3
