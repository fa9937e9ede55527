"""Run small sweeps in places that lack something: a short TMPDIR, flock, a home folder, an experiment, a steady clock.

What a process would meet is put in by a `sitecustomize` of its own, which Ray's processes load too.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sweep.tracking.sqlite_store import schemas

from .nodes import ENV
from .sweeps import Sweep, config, only_folder

NO_FLOCK = """
import errno, fcntl, os
def flock(handle, flags):
    if "lock" in os.path.basename(os.readlink(f"/proc/self/fd/{handle if isinstance(handle, int) else handle.fileno()}")):
        raise OSError(errno.ENOSYS, "Function not implemented")
    return flock_of_the_kernel(handle, flags)
flock_of_the_kernel, fcntl.flock = fcntl.flock, flock
"""
SET_BACK = """
import os, time
began, wall = time.monotonic(), time.time
time.time = lambda: wall() - (172_800.0 if time.monotonic() - began > 8.0 else 0.0)
"""
NO_HOME = """
import os, pwd
def getpwuid(uid):
    raise KeyError(uid)
pwd.getpwuid = getpwuid
os.environ.pop("HOME", None)
"""


@dataclass(frozen=True)
class Run:
    """How a driver ended: exit code, seconds, what it printed, and its sweep folder, if it made one."""

    code: int
    seconds: float
    text: str
    folder: Path | None

    def row(self) -> str:
        if self.folder is None:
            return f"one line after {self.seconds:.1f} s, nothing written"
        outcomes = sorted({json.loads(file.read_text())["outcome"] for file in self.folder.glob("trials/*/result.json")})
        faults = len(Sweep.read(self.folder).faults)
        return f"exit code {self.code} after {self.seconds:.1f} s; {', '.join(outcomes)}; {faults} faults"


def run(where: Path, customize: str = "", arguments: tuple[str, ...] = (), **env: str) -> Run:
    """Run a sweep of two trials in `where`, or resume with the arguments."""
    where.mkdir(parents=True, exist_ok=True)
    (where / "sitecustomize.py").write_text(customize)
    file = where / "config.json"
    sections = {"optim": {"eps": 1.5}, "sweep": {"num_trials": 2}, "pruner": {"name": "none"}, "cluster": {"num_cpu_slots": 1}}
    file.write_text(json.dumps(config(where / "sweeps", **sections)))
    path = os.pathsep.join(filter(None, [str(where), ENV.get("PYTHONPATH"), os.getcwd()]))
    command = [sys.executable, "-m", "tests.support.fake_driver", *(arguments or ("start", str(file)))]
    began_s = time.monotonic()
    done = subprocess.run(command, env={**ENV, **env, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    folder = only_folder(where / "sweeps") if (where / "sweeps").is_dir() else None
    return Run(done.returncode, time.monotonic() - began_s, done.stdout + done.stderr, folder)


def long_tmpdir(where: Path) -> Run:
    folder = where / ("l" * 89)
    folder.mkdir(parents=True)
    return run(where, TMPDIR=str(folder))


def no_flock(where: Path) -> Run:
    return run(where, NO_FLOCK)


def no_home(where: Path) -> Run:
    return run(where, NO_HOME)


def clock_set_back(where: Path) -> Run:
    return run(where, SET_BACK)


def deleted_experiment(where: Path) -> Run:
    """Run a sweep whose experiment someone has deleted. The database holds only what the check reads."""
    (where / "sweeps").mkdir(parents=True)
    with closing(sqlite3.connect(where / "sweeps" / "mlflow.db")) as made, made:
        made.execute("create table alembic_version (version_num)")
        made.execute("create table experiments (experiment_id, name, lifecycle_stage)")
        made.execute("insert into alembic_version values (?)", [schemas()[0]])
        made.execute("insert into experiments values (1, 'sweep', 'deleted')")
    return run(where)
