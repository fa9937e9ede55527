"""Run one whole sweep under Ray, with the fake engine, in which every fault happens; read its page meanwhile.

A start of Ray takes half a minute of processor with its workers, so the tests share this sweep.
"""

from __future__ import annotations

import fcntl
import json
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.support.fake_sweeps import start

FITS, TOO_LARGE = 4, 32  # ranks; the fake planner takes them for GiB, and the card has 24
SPACE = {
    "lora.rank": {"choices": [FITS, TOO_LARGE]},
    "optim.weight_decay": {"choices": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]},  # the fake engine's faults
}


@dataclass(frozen=True)
class WatchedSweep:
    """An ended sweep.

    folder: the test's own; the sweep's is below sweeps/. path: a folder whose nvidia-smi lists two
    GPUs. pages: the page for Prometheus, each time that it was read.
    """

    folder: str
    path: str
    returncode: int
    out: str
    err: str
    pages: list[str]


def watched_sweep(place: Path) -> WatchedSweep:
    """Run the sweep in this folder, or read what another process of the tests made there."""
    place.mkdir(exist_ok=True)
    record = place / "watched.json"
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not record.exists():
            record.write_text(json.dumps(asdict(_run(place / "sweep"))))
    return WatchedSweep(**json.loads(record.read_text()))


def two_gpus(place: Path) -> str:
    """Make a folder with an nvidia-smi that lists two GPUs; the fake engine needs nothing else."""
    program = place / "bin" / "nvidia-smi"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho 0\necho 1\n")
    program.chmod(0o755)
    return str(program.parent)


def _run(folder: Path) -> WatchedSweep:
    path = two_gpus(folder)
    process = start(
        folder, path, optim={"eps": 0.1}, space=SPACE, sampler={"name": "grid"}, pruner={"name": "none"},
        cluster={"max_retries": 1}, tracking={"name": "none", "metrics_port": 0},
    )  # fmt: skip
    lines, pages = [], []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("metrics "):
            pages = _pages(line.split()[1], process)
    _, err = process.communicate(timeout=200)
    return WatchedSweep(str(folder), path, process.returncode, "".join(lines), err, pages)


def _pages(address: str, process) -> list[str]:
    """Read the page until the driver serves it no more."""
    pages: list[str] = []
    while process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=10) as page:
                text = page.read().decode()
        except OSError:
            break
        pages += [] if pages and pages[-1] == text else [text]
        time.sleep(0.1)
    return pages
