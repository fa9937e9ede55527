"""Cause one fault in a real sweep with the fake engine; measure its effect and its duration."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from .disk import Disk
from .nodes import Nodes
from .sweeps import NUM_RUNGS, Driver, Sweep, config, only_folder


@dataclass(frozen=True)
class Found:
    """The effect and the duration of one fault.

    seconds: the duration that measures the fault. sweep: the whole sweep at its end. text: the
    driver's output.
    """

    seconds: float
    sweep: Sweep
    text: str
    results: dict[int, dict[str, Any]]
    num_rungs_again: int = 0  # trained before the fault and once more after it


def faulty_space(*faults: float) -> dict[str, Any]:
    """Return a grid with one trial for each fault of the fake engine; 0 means none."""
    return {
        "space": {"optim.weight_decay": {"choices": list(faults)}},
        "sampler": {"name": "grid"},
        "pruner": {"name": "none"},
        "sweep": {"num_trials": len(faults)},
    }


def diverged(where: Path, fault: float) -> Found:
    """On one slot, let the middle one of three trials diverge.

    seconds: from the fault to the next trial's start on the slot.
    """
    whole = config(where / "sweeps", cluster={"num_cpu_slots": 1, "report_timeout_s": 60.0}, **faulty_space(fault, 0.0, 0.1, 0.2))
    driver = Driver.start(whole, where)
    code = driver.wait()
    assert code == 0, driver.text()
    folder = only_folder(where / "sweeps")
    times = list(folder.glob("trials/*/fault_times.txt"))
    fault_s = float(times[0].read_text())
    after = [start.time_s for file in folder.glob("trials/*/starts.txt") for start in _starts(file) if start.time_s > fault_s]
    return _found(driver, folder, min(after, default=float("inf")) - fault_s)


def hung(where: Path, fault: float, timeout_s: float = 5.0) -> Found:
    """Let one trial hang at its second rung.

    seconds: from the fault until it continues in another process, without the timeout.
    """
    whole = config(where / "sweeps", cluster={"num_cpu_slots": 1, "report_timeout_s": timeout_s, "max_retries": 1},
                   **faulty_space(fault, 0.0))  # fmt: skip
    driver = Driver.start(whole, where)
    assert driver.wait() == 0, driver.text()
    folder = only_folder(where / "sweeps")
    file = next(folder.glob("trials/*/fault_times.txt"))
    starts = _starts(file.with_name("starts.txt"))
    return _found(driver, folder, starts[1].time_s - float(file.read_text().split()[0]) - timeout_s)


def worker_killed(where: Path) -> Found:
    """SIGKILL the worker of a running trial.

    seconds: until the trial continues in another process.
    """
    driver = Driver.start(config(where / "sweeps", optim={"eps": 1.5}, sweep={"num_trials": 4}, pruner={"name": "none"}), where)
    starts = _running(where / "sweeps", 1, driver)[0]
    return _ended_by(lambda: os.kill(_starts(starts)[0].pid, signal.SIGKILL), starts, driver, where)


def node_lost(where: Path, number: signal.Signals) -> Found:
    """Lose one of two one-slot nodes next to the driver's, while a third joins.

    seconds: until the lost node's trial continues.
    """
    with Nodes(num_cpus=0) as nodes:
        first, second = nodes.add(1), nodes.add(1)
        assert first == second == "done"
        cluster = {"address": nodes.address, "max_concurrent": 2}
        whole = config(where / "sweeps", cluster=cluster, optim={"eps": 2.0}, sweep={"num_trials": 4}, pruner={"name": "none"})
        driver = Driver.start(whole, where)
        running = _running(where / "sweeps", 2, driver)
        nodes.add(1)
        on_second = next(file for file in running if nodes.has(1, _starts(file)[-1].pid))
        end = nodes.kill if number == signal.SIGKILL else nodes.terminate
        return _ended_by(lambda: end(1), on_second, driver, where)


def driver_terminated(
    where: Path, everywhere: bool = False, number: signal.Signals = signal.SIGTERM
) -> tuple[Found, int, list[float]]:
    """Send a signal to a driver in the middle of a rung of two trials; resume the sweep to its end.

    everywhere: the signal also goes to the driver's Ray and workers, as from a machine about to be
    taken away or a closed terminal. seconds: until the driver has ended. Also returns its exit
    code, and the seconds of that rung that each trial had saved.
    """
    sections = {"optim": {"eps": 6.0}, "sweep": {"num_trials": 2}, "pruner": {"name": "none"}, "cluster": {"max_retries": 0}}
    driver = Driver.start(config(where / "sweeps", **sections), where)
    trials = [file.parent for file in _running(where / "sweeps", 2, driver)]
    time.sleep(2.0)
    began = time.monotonic()
    if everywhere:
        for child in psutil.Process(driver.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)
    driver.kill(number)
    seconds = time.monotonic() - began
    saved = [json.loads((trial / "within_rung.json").read_text())["seconds"] for trial in trials]
    folder = only_folder(where / "sweeps")
    resumed = Driver.resume(folder)
    assert resumed.wait() == 0, resumed.text()
    return _found(resumed, folder, seconds), driver.process.returncode, saved


def disk_full(where: Path) -> Found:
    """Fill the sweep's disk after the first report; resume once there is room.

    seconds: until the driver has ended.
    """
    with Disk(where) as disk:
        whole = config(disk.path / "sweeps", optim={"eps": 0.3}, sweep={"num_trials": 4}, pruner={"name": "none"})
        driver = Driver.start({**whole, "tracking": {"name": "none"}}, where.with_name(f"{where.name}-logs"))
        _running(disk.path / "sweeps", 1, driver)
        disk.fill()
        began_s = time.monotonic()
        code, seconds = driver.wait(), time.monotonic() - began_s
        assert code == 1, driver.text()
        disk.make_room()
        resumed = Driver.resume(only_folder(disk.path / "sweeps"))
        assert resumed.wait() == 0, resumed.text()
        return _found(resumed, only_folder(disk.path / "sweeps"), seconds)


def tracked(where: Path, uri: str) -> Found:
    """Record four trials on one slot in that store.

    seconds: from the first one's beginning to the last one's end.
    """
    sections = {"tracking": {"name": "mlflow", "uri": uri}, "cluster": {"num_cpu_slots": 1}, "sweep": {"num_trials": 4}}
    driver = Driver.start(config(where / "sweeps", optim={"eps": 0.5}, pruner={"name": "none"}, **sections), where)
    assert driver.wait(600) == 0, driver.text()
    folder = only_folder(where / "sweeps")
    results = [json.loads(file.read_text()) for file in folder.glob("trials/*/result.json")]
    return _found(driver, folder, max(r["ended_s"] for r in results) - min(r["started_s"] for r in results))


def second_driver(where: Path) -> tuple[Found, str, int]:
    """Start a second driver on a running sweep.

    seconds: until it is refused. Also returns its output and its exit code.
    """
    driver = Driver.start(config(where / "sweeps", optim={"eps": 1.5}, sweep={"num_trials": 4}), where)
    _running(where / "sweeps", 1, driver)
    second = Driver.resume(only_folder(where / "sweeps"))
    code = second.wait()
    seconds = time.monotonic() - second.started_s
    assert driver.wait() == 0, driver.text()
    return _found(driver, only_folder(where / "sweeps"), seconds), second.text(), code


@dataclass(frozen=True)
class _Start:
    pid: int
    num_reports: int
    time_s: float


def _starts(file: Path) -> list[_Start]:
    rows = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    return [_Start(int(pid), int(reports), float(time_s)) for pid, reports, time_s in rows]


def _running(output: Path, num_trials: int, driver: Driver) -> list[Path]:
    """Return starts.txt of so many trials that have reported and not ended."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert driver.process.poll() is None, driver.text()
        files = [
            file
            for file in sorted(output.glob("*/trials/*/starts.txt"))
            if file.with_name("reports.jsonl").exists()
            and len(file.with_name("reports.jsonl").read_text().splitlines()) < NUM_RUNGS - 1
            and not file.with_name("result.json").exists()
        ]
        if len(files) >= num_trials:
            return files
        time.sleep(0.02)
    raise TimeoutError(driver.text())


def _ended_by(end, starts: Path, driver: Driver, where: Path) -> Found:
    """Let `end` end the worker of this trial, and wait for the sweep's end."""
    began_s = time.time()
    end()
    saved = len(starts.with_name("reports.jsonl").read_text().splitlines())
    assert driver.wait() == 0, driver.text()
    after = _starts(starts)[1]
    return _found(driver, only_folder(where / "sweeps"), after.time_s - began_s, max(saved - after.num_reports, 0))


def _found(driver: Driver, folder: Path, seconds: float, num_rungs_again: int = 0) -> Found:
    results = {int(file.parent.name): json.loads(file.read_text()) for file in folder.glob("trials/*/result.json")}
    return Found(seconds, Sweep.read(folder), driver.text(), results, num_rungs_again)
