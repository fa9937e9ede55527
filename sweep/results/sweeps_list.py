"""List the sweeps of a folder: how each stands, and its best loss. `python -m sweep list [folder]`."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from engine.errors import EngineError, InputError, printable
from engine.system.user_path import user_path
from sweep.folder.sweep_folder import SweepFolder
from sweep.study.journal import DAMAGED, read_records
from sweep.text import number
from sweep.trials.record import GOING_ON, Outcome

RUNNING, ENDED, STOPPED, DAMAGED_FOLDER = "running", "ended", "stopped", "cannot be read"
HEADER = ("sweep", "state", "trials ended", "best loss", "by trial")


@dataclass(frozen=True)
class SweepState:
    """Hold what is listed of one sweep. best: loss and number of the trial that would be chosen now."""

    name: str
    state: str
    num_ended: int = 0
    num_trials: int = 0
    best: tuple[float, int] | None = None

    def cells(self) -> tuple[str, ...]:
        loss, trial = ("-", "-") if self.best is None else (number(self.best[0], ".4f"), str(self.best[1]))
        ended = "-" if self.state == DAMAGED_FOLDER else f"{self.num_ended} of {self.num_trials}"
        return printable(self.name), self.state, ended, loss, trial


def print_sweeps(arguments: list[str]) -> int:
    """Print the table. Returns the exit code. Raises InputError for a folder that is none."""
    parser = argparse.ArgumentParser(prog="python -m sweep list", description="List the sweeps of a folder.")
    parser.add_argument("folder", nargs="?", default="sweeps", help="sweep.output_dir; default: sweeps")
    given = parser.parse_args(arguments).folder
    place = user_path(given)
    if not place.is_dir():
        raise InputError("folder", given, "must be a folder with sweeps in it")
    found = [read_state(file.parent) for file in sorted(place.glob("*/sweep_config.json"))]
    if not found:
        print(f"no sweep in {given}")
        return 0
    rows = [HEADER, *(state.cells() for state in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip())
    return 0


def read_state(path: Path) -> SweepState:
    """Return how the sweep stands, from its files alone. Changes nothing."""
    folder = SweepFolder(path)
    try:
        config = folder.read_config()
        records = [record for record in read_records(folder, lambda params: {})[1] if record.source is None]
    except (EngineError, OSError, *DAMAGED):
        return SweepState(path.name, DAMAGED_FOLDER)
    tried = [record for record in records if record.outcome is not Outcome.INFEASIBLE]
    ended = [record for record in tried if record.outcome not in GOING_ON]
    is_at_rest = all(record.outcome is not Outcome.RUNNING for record in tried)
    best = config.rule.best(records)
    is_done = is_at_rest and _num_listed(path) == len(records)
    state = RUNNING if folder.is_driven() else ENDED if is_done else STOPPED
    return SweepState(path.name, state, len(ended), config.sweep.num_trials, None if best is None else (best.score, best.number))


def _num_listed(path: Path) -> int | None:
    """Return the trials in the leaderboard, which a sweep writes at its end; None without one."""
    try:
        return sum(row.get("source") is None for row in json.loads((path / "leaderboard.json").read_text())["trials"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
