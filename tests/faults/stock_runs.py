"""Run sweeps of stock Ray Tune (stock.py) with one fault each; describe the results in words."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .disk import Disk
from .mlflow_servers import Slow, free_port, serve
from .nodes import ENV, Nodes
from .stock import NUM_TRIALS

PATIENCE_S = 120.0
DIVERGING = ("nan", "explodes", "zero")


def tracked(where: Path) -> str:
    def span(how: str, uri: str) -> float | str:
        place = where / f"stock-mlflow-{how}"
        process = _driver(place, "start", "none", "0.5", "4", mlflow=uri)
        ended, times = _ended(process), [time_s for *_, time_s in _events(place)]
        if process.returncode or not times:
            return f"{ended} ({_last_line(place / 'start.log')})"
        return max(times) - min(times) + 0.5

    with mlflow_addresses(where) as uris:
        return each(uris, span)


@contextmanager
def mlflow_addresses(where: Path) -> Iterator[dict[str, str]]:
    """Return addresses of a running server, of one that takes 2 s a call, and of none."""
    folder = Path(tempfile.mkdtemp(dir=where))
    port, nobody = free_port(), free_port()
    server = serve(folder, port)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.2)
        slow = Slow(port, 2.0)
        yield {how: f"http://127.0.0.1:{p}" for how, p in (("there", port), ("slow", slow.server_port), ("down", nobody))}
    finally:
        server.terminate()
        server.wait()


def each(uris: dict[str, str], seconds: Callable[[str, str], float | str]) -> str:
    found = {how: seconds(how, uri) for how, uri in uris.items()}
    return "; ".join(f"{how}: {one if isinstance(one, str) else f'{one:.1f} s'}" for how, one in found.items())


def _driver(where: Path, command: str, fault: str, *more: str, **env_of_stock: str) -> subprocess.Popen:
    """Start a driver. env_of_stock: address, mlflow, storage; see stock.py."""
    where.mkdir(parents=True, exist_ok=True)
    arguments = [sys.executable, "-m", "tests.faults.stock", command, str(where), fault, *more]
    with open(where / f"{command}.log", "a") as out:
        # Optuna looks for the real one
        env = {name: value for name, value in ENV.items() if name != "FAKE_TORCH"}
        env |= {f"STOCK_{name.upper()}": value for name, value in env_of_stock.items()}
        return subprocess.Popen(arguments, env=env, stdout=out, stderr=out)


def with_fault(where: Path, fault: str) -> str:
    """Cause one fault in a sweep of 4 trials.

    Tells how long it takes until the trial continues, and what the end shows.
    """
    process = _driver(where, "start", fault, "0.1", "4")
    ended = _ended(process)
    if process.returncode:
        return f"{ended} ({_last_line(where / 'start.log')})"
    events, at_s = _events(where), float((where / "faulted").read_text())
    rows = json.loads((where / "found-start.json").read_text())
    found = f"{sum(not row['error'] for row in rows)} of 4 ended without error; losses {_losses(rows)}"
    if fault in DIVERGING:  # its first trial, at its second rung
        num_later = sum(trial == events[0][0] and rung > 2 for trial, rung, *_ in events)
        return f"{num_later} more rungs of that trial trained; {found}"
    next_s = min((time_s for *_, time_s in events if time_s > at_s), default=float("inf"))
    return f"{next_s - at_s:.2f} s; {found}"


def _events(where: Path) -> list[list]:
    """Return trial, rung, process and time of each rung trained so far."""
    file = where / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _trains(where: Path, process: subprocess.Popen, num_rungs: int = 2) -> None:
    """Wait until so many rungs are trained."""
    deadline = time.monotonic() + PATIENCE_S
    while len(_events(where)) < num_rungs:
        assert process.poll() is None and time.monotonic() < deadline, _last_line(where / "start.log")
        time.sleep(0.05)


def _again(where: Path) -> int:
    """Count the rungs that were trained more than once."""
    done = [(trial, rung) for trial, rung, *_ in _events(where)]
    return len(done) - len(set(done))


def _ended(process: subprocess.Popen) -> str:
    try:
        return f"exit code {process.wait(PATIENCE_S)}"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"not ended after {PATIENCE_S:.0f} s"


def _found(where: Path, command: str) -> str:
    file = where / f"found-{command}.json"
    if not file.exists():
        return f"no results ({_last_line(where / f'{command}.log')})"
    rows = json.loads(file.read_text())
    whole = sum(row["loss"] is not None and not row["error"] for row in rows)
    return f"{whole} of {len(rows)} trials with a result, {_again(where)} rungs trained again"


def node_lost(where: Path, number: signal.Signals) -> str:
    """Lose one of two nodes, with the trial on it."""
    where = where / f"stock-node-{number.name}"
    with Nodes(num_cpus=0) as nodes:
        nodes.add(1)
        process = _driver(where, "start", "none", "2.0", "3", address=nodes.address)
        _trains(where, process)
        nodes.add(1)
        lost_s, before = time.time(), len(_events(where))
        (nodes.kill if number == signal.SIGKILL else nodes.terminate)(0)
        ended = _ended(process)
    after = [time_s for *_, time_s in _events(where)[before:] if time_s > lost_s + 2.0]
    went_on = f"went on after {min(after) - lost_s - 2.0:.1f} s" if after else "never went on"
    return f"{went_on}; {ended}; {_found(where, 'start')}"


def driver_terminated(where: Path) -> str:
    """Send SIGTERM to the driver, then use Tuner.restore."""
    where = where / "stock-terminated"
    process = _driver(where, "start", "none", "3.0", "3")
    _trains(where, process)
    began_s = time.monotonic()
    process.terminate()
    ended, seconds = _ended(process), time.monotonic() - began_s
    return f"{ended} after {seconds:.1f} s; restored: {_ended(_driver(where, 'resume', 'none'))}; {_found(where, 'resume')}"


def disk_full(where: Path) -> str:
    """Fill the disk of Tune's folder after the second rung, make room, then use Tuner.restore."""
    where = where / "stock-disk"
    with Disk(where.with_name("small")) as disk:
        storage = str(disk.path)
        process = _driver(where, "start", "none", "0.3", "4", storage=storage)
        _trains(where, process)
        disk.fill()
        ended = _ended(process)
        disk.make_room()
        if (where / "found-start.json").exists():
            return f"{ended}; {_found(where, 'start')}"
        restored = _ended(_driver(where, "resume", "none", storage=storage))
        return f"{ended} ({_last_line(where / 'start.log')}); restored: {restored}; {_found(where, 'resume')}"


def second_driver(where: Path) -> str:
    """Let a second driver restore from the folder of a running one."""
    where = where / "stock-second"
    first = _driver(where, "start", "none", "3.0", "3")
    _trains(where, first)
    second = _driver(where, "resume", "none")
    second_ended, first_ended = _ended(second), _ended(first)
    return f"the second: {second_ended}, {_found(where, 'resume')}; the first: {first_ended}, {_found(where, 'start')}"


def _losses(rows: list[dict]) -> str:
    return ", ".join("none" if row["loss"] is None else f"{row['loss']:.2f}" for row in rows)


def drivers_killed(where: Path, num_kills: int) -> str:
    """Kill and restore each sweep once.

    Counts how many continued, and how many of their results are complete and new.
    """
    rng, resumed, whole, same, lines = random.Random(0), 0, 0, 0, []
    calm = where / "stock-calm"
    began = time.monotonic()
    assert _driver(calm, "start", "none").wait(PATIENCE_S) == 0, (calm / "start.log").read_text()[-2000:]
    duration_s = time.monotonic() - began
    reference = json.loads((calm / "found-start.json").read_text())
    for number in range(num_kills):
        place = where / f"stock-{number}"
        process = _driver(place, "start", "none")
        while not (place / "events.jsonl").exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.uniform(0.0, duration_s / 3.0))
        process.kill()
        process.wait()
        again = _driver(place, "resume", "none")
        try:
            code = again.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            again.kill()
            code = "hung"
        if code != 0:
            lines.append(f"{code}: {_last_line(place / 'resume.log')}")
            continue
        resumed += 1
        rows = json.loads((place / "found-resume.json").read_text())
        whole += len(rows) == NUM_TRIALS and all(row["loss"] is not None and not row["error"] for row in rows)
        same += [row["params"] for row in rows] == [row["params"] for row in reference]
    causes = "; ".join(sorted(set(lines)))
    return (
        f"{resumed} of {num_kills} restored; {whole} of them with {NUM_TRIALS} results; {same} with the "
        "undisturbed sweep's trials" + (f" ({causes[:200]})" if causes else "")
    )


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    return lines[-1][:120] if lines else ""
