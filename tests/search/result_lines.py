"""Keep the regrets of replays in a file of JSON lines that grows by portions.

The first line says what was replayed. Each further line holds one portion of the replays of a
strategy. So a command that was ended goes on where it stood, and its file can be read meanwhile.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
HERE = ("clock", "design", "measures", "peer_sides", "points", "product_side", "recorded_tasks", "strategies", "synthetic",
        "tune_hooks")  # fmt: skip
SOURCES = ("sweep/curves/*.py", "sweep/prior/*.py", *(f"tests/search/{name}.py" for name in HERE))
KEY = ("task", "strategy", "slots", "cost")


class Portion(NamedTuple):
    """Hold replays `first`, `first` + 1, ... of one strategy on one task.

    seen, judged: regrets in nats, [number of costs][number of replays]; see measures.Regret. seconds: of
    processor, of all of them.
    """

    task: str
    strategy: str
    slots: int
    costs: tuple[float, ...]
    first: int
    seen: list[list[float]]
    judged: list[list[float]]
    seconds: float


class ResultFile:
    """Append portions to a file. `known` holds those that it had when it was opened."""

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        """path: None keeps nothing. Raises ValueError if the file's replays were of something else."""
        self._path, self.known = path, []
        if path is None:
            return
        if path.exists() and path.stat().st_size:
            before, self.known = read_portions(path)
            if before != about:
                name = next(key for key in {**before, **about} if before.get(key) != about.get(key))
                raise ValueError(f"{path}: {name} was {before.get(name)} and is {about.get(name)} now; name another file")
            text = path.read_text()
            path.write_text(text[: text.rfind("\n") + 1])  # a kill may have cut the last line
        else:
            self._write(about)

    def add(self, portion: Portion) -> None:
        if self._path is not None:
            self._write(portion._asdict())

    def _write(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def about(keep: float, schedule: str, adapter: str, tasks: dict[str, int], setup: Sequence[float]) -> dict[str, Any]:
    """Return what replays must have in common to be compared, and the version of what was replayed."""
    return {
        "keep": keep, "schedule": schedule, "adapter": adapter, "tasks": tasks, "setup": list(setup), "version": version(),
    }  # fmt: skip


def version() -> str:
    """Return a checksum of the sources that decide in a replay."""
    files = sorted(file for pattern in SOURCES for file in ROOT.glob(pattern))
    return f"{zlib.crc32(b''.join(file.read_bytes() for file in files)):08x}"


def read_portions(path: Path) -> tuple[dict[str, Any], list[Portion]]:
    """Return what was replayed, and the portions. Raises ValueError if the file is no such file."""
    lines = path.read_text().split("\n")[:-1]
    try:
        return json.loads(lines[0]), [_portion(json.loads(line)) for line in lines[1:]]
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not written by replay --json ({error})") from None


def rows_of(portions: Iterable[Portion]) -> list[dict[str, Any]]:
    """Return a row for each task, strategy, slots and cost.

    seen and judged of a row hold the regret by number of the replay, ascending.
    """
    rows: dict[tuple, dict[str, Any]] = {}
    for portion in portions:
        for at, cost in enumerate(portion.costs):
            key = (portion.task, portion.strategy, portion.slots, cost)
            row = rows.setdefault(key, {**dict(zip(KEY, key)), "seen": {}, "judged": {}, "seconds": 0.0})
            for measure, values in (("seen", portion.seen[at]), ("judged", portion.judged[at])):
                row[measure].update(enumerate(values, portion.first))
            row["seconds"] += portion.seconds / len(portion.costs)
    for row in rows.values():
        row |= {measure: dict(sorted(row[measure].items())) for measure in ("seen", "judged")}
    return list(rows.values())


def read_rows(files: Sequence[Path], order: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of several files; where two hold the same row, the last one counts.

    order: of the strategies. Raises ValueError if the files do not compare.
    """
    rows: dict[tuple, dict[str, Any]] = {}
    first = None
    for file in files:
        what, portions = read_portions(file)
        what = {"setup": [0.0, 0.0], **what}
        what.pop("version", None)
        first = first or what
        if what != first:
            raise ValueError(f"{file}: {what} does not compare with {first}")
        rows |= {tuple(row[name] for name in KEY): row for row in rows_of(portions)}
    return in_order(rows.values(), order)


def in_order(rows: Iterable[dict[str, Any]], order: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows by task, slots, strategy and cost."""
    return sorted(rows, key=lambda row: (row["task"], row["slots"], order.index(row["strategy"]), row["cost"]))


def _portion(line: dict[str, Any]) -> Portion:
    return Portion(**{**line, "costs": tuple(line["costs"])})
