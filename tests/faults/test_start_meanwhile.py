"""A real Ray that starts during the preparation is the run's own, or is gone after its end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.fake_sweeps import FAKE_ENV, sweep_folder, write_config

pytestmark = [pytest.mark.faults, pytest.mark.timeout(200)]
SPACE = {"lora.rank": {"choices": [2, 4]}}
STOPPED = "stopped before the sweep began; nothing was written\n"


def begin(tmp_path: Path, prepare_s: float, **sections) -> subprocess.Popen:
    config = write_config(tmp_path, space=SPACE, sweep={"num_trials": 2}, pruner={"name": "none"}, **sections)
    command = [sys.executable, "-m", "tests.support.fake_driver", "start", str(config)]
    env = {**FAKE_ENV, "FAKE_PREPARE_S": str(prepare_s)}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def rays_processes(process: subprocess.Popen, num_workers: int = 0, within_s: float = 60.0) -> list[psutil.Process]:
    """Return the driver's raylet and control store, and the workers, once there are so many of those."""
    deadline = time.monotonic() + within_s
    while True:
        found = [one for one in psutil.Process(process.pid).children(recursive=True) if is_rays(one)]
        workers = [one for one in found if one.name().startswith("ray::IDLE")]
        if len(workers) >= num_workers or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def is_rays(process: psutil.Process) -> bool:
    try:
        return process.name().startswith(("raylet", "gcs_server", "ray::"))
    except psutil.Error:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_driver_that_is_stopped_while_it_prepares_leaves_no_process(tmp_path, number):
    process = begin(tmp_path, 600.0)
    found = rays_processes(process, 2)
    assert len(found) >= 4
    process.send_signal(number)
    assert process.wait(60) == (-number if number == signal.SIGKILL else 130)
    said = process.stderr.read()
    assert said.endswith("" if number == signal.SIGKILL else f"\n{STOPPED}")
    assert "Traceback" not in said
    if number == signal.SIGKILL:  # Ray's agents see only after a minute that their raylet is gone
        found = [one for one in found if not one.name().endswith("Agent")]
    assert psutil.wait_procs(found, timeout=20)[1] == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_refusal_ends_the_driver_at_once_with_its_ray(tmp_path, num_workers):
    """Without workers, Ray is still on its way when the line is printed."""
    prepare_s = 12.0 if num_workers else 2.0
    process = begin(tmp_path, prepare_s, data={"train": "missing.jsonl", "max_seq_length": 8})
    found = rays_processes(process, num_workers)
    assert process.stderr.readline() == "error: data.train = 'missing.jsonl': no such file\n"
    said_s = time.monotonic()
    assert process.wait(60) == 2
    assert time.monotonic() - said_s < 2.0
    assert process.stderr.read() == ""
    assert psutil.wait_procs(found, timeout=20)[1] == []


def test_trials_run_in_the_processes_that_were_there_before_the_sweep_began(tmp_path):
    process = begin(tmp_path, 12.0)
    found = rays_processes(process, 2)
    assert not (tmp_path / "sweeps").exists()
    assert process.wait(120) == 0, process.stderr.read()
    folder = sweep_folder(tmp_path)
    pids = {int(file.read_text().split()[0]) for file in folder.glob("trials/*/starts.txt")}
    assert pids and pids <= {one.pid for one in found}
    log = (folder / "driver.log").read_text()
    assert log.count("Started a local Ray instance") == 1
    assert psutil.wait_procs(found, timeout=20)[1] == []
    assert json.loads((folder / "leaderboard.json").read_text())["reevaluation"]["agrees"]
