"""Print the measured figures as rows of a Markdown table, next to stock Ray Tune's.

`python -m tests.faults.table [NUM_KILLS [NUM_STOCK_KILLS [ROW ...]]]` prints each row as soon as it
is measured.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import kills, measure, places, stock_runs

PLACES = {
    "TMPDIR of 89 characters": places.long_tmpdir, "no flock": places.no_flock, "no home folder": places.no_home,
    "deleted experiment": places.deleted_experiment, "clock set back by two days": places.clock_set_back,
}  # fmt: skip


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.table", description=__doc__)
    parser.add_argument("num_kills", type=int, nargs="?", default=20)
    parser.add_argument("num_stock_kills", type=int, nargs="?", default=5)
    parser.add_argument("rows", nargs="*", help="only rows whose names begin so")
    options = parser.parse_args(arguments)
    print_rows(options.num_kills, options.num_stock_kills, options.rows)


def print_rows(num_kills: int, num_stock_kills: int, wanted: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        ours, stock = Path(folder) / "ours", Path(folder) / "stock"
        ours.mkdir()
        stock.mkdir()
        rows = {
            "worker SIGKILL": (lambda: _ours(measure.worker_killed(ours / "worker")), lambda: _stock(stock, "dies")),
            "NaN loss": (lambda: _ours(measure.diverged(ours / "nan", 12.0)), lambda: _stock(stock, "nan")),
            "loss explodes": (lambda: _ours(measure.diverged(ours / "explodes", 2.0)), lambda: _stock(stock, "explodes")),
            "gradient is zero": (lambda: "as above", lambda: _stock(stock, "zero")),
            "hung trial, timeout 5 s": (lambda: _ours(measure.hung(ours / "hung", 8.0)), lambda: _stock(stock, "hangs")),
            "node SIGKILL": _node(ours, stock, signal.SIGKILL),
            "node SIGTERM": _node(ours, stock, signal.SIGTERM),
            "driver SIGTERM": (
                lambda: _ours(measure.driver_terminated(ours / "driver")[0]),
                lambda: stock_runs.driver_terminated(stock),
            ),
            "disk full": (lambda: _ours(measure.disk_full(ours / "disk")), lambda: stock_runs.disk_full(stock)),
            "MLflow there, slow (2 s a call), down": (lambda: _tracked(ours), lambda: stock_runs.tracked(stock)),
            "second driver": (lambda: _ours(measure.second_driver(ours / "two")[0]), lambda: stock_runs.second_driver(stock)),
            **{name: _place(ours / "places" / name, fault) for name, fault in PLACES.items()},
            f"driver SIGKILL x {num_kills} and {num_stock_kills}": (
                lambda: _killed(num_kills),
                lambda: stock_runs.drivers_killed(stock, num_stock_kills),
            ),
        }
        print("| fault | this project | stock Ray Tune, OptunaSearch, ASHA |\n|---|---|---|", flush=True)
        for name, measures in rows.items():
            if not wanted or any(name.startswith(prefix) for prefix in wanted):
                print(f"| {name} | {' | '.join(measured() for measured in measures)} |", flush=True)


def _place(where: Path, fault: Callable[[Path], places.Run]):
    return lambda: fault(where).row(), lambda: "not tried"


def _node(ours: Path, stock: Path, number: signal.Signals):
    return lambda: _ours(measure.node_lost(ours / number.name, number)), lambda: stock_runs.node_lost(stock, number)


def _stock(stock: Path, fault: str) -> str:
    return stock_runs.with_fault(stock / fault, fault)


def _ours(found: measure.Found) -> str:
    outcomes = ", ".join(sorted({result["outcome"] for result in found.results.values()}))
    return f"{found.seconds:.2f} s; {outcomes}; {len(found.sweep.faults)} faults; {found.num_rungs_again} rungs trained again"


def _tracked(where: Path) -> str:
    """Return the seconds in which four trials trained, by the state of MLflow."""
    with stock_runs.mlflow_addresses(where) as uris:
        return stock_runs.each(uris, lambda how, uri: measure.tracked(where / f"mlflow-{how}", uri).seconds)


def _killed(num_kills: int) -> str:
    tally = kills.main(num_kills)
    return (
        f"{tally.num_resumed} of {tally.num_kills} resumed, median {statistics.median(tally.seconds):.1f} s; {tally.num_results} "
        f"results in {tally.num_sweeps} sweeps, {len(tally.faults)} faults; {tally.num_equal} of {tally.num_must_be_equal} "
        f"sweeps that must be are the undisturbed one; same best in {tally.num_same_best} of {tally.num_sweeps}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
