"""Replay searches on recorded curves, and print how good the adapters are that they find.

    python -m tests.search.replay --curves tests/search/curves --replays 100 --json results.json
    python -m tests.search.replay --synthetic usual sharp --strategies random_halving one_look

Cost is in full trials' tokens. Each replay has its own seed, searches a part of the table drawn by
that seed, and shows one of the recorded seeds of each config. All strategies get the same seeds. On
the whole table a strategy that draws nothing would do the same in every replay.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna

from .clock import Clock
from .measures import Judge, Regret
from .points import Task
from .recorded_tasks import ADAPTERS, make_task, read_tasks
from .strategies import STRATEGIES, Setting
from .synthetic import FAMILIES, make_content
from .table import comparison, print_tables

KEEP = 0.75
PORTION = 5  # replays that a process does before it takes others


class Job(NamedTuple):
    """Name a portion of the replays of one strategy on one task."""

    task: int
    strategy: str
    num_slots: int
    costs: tuple[float, ...]
    replays: range


def replay(task: Task, name: str, num_slots: int, costs: Sequence[float], seed: int, keep: float = KEEP) -> list[Regret]:
    """Return the regret at each cost, ascending, of one replay. keep: share of the table that it searches."""
    task = task.part(keep, seed)
    strategy, judge, seeds = STRATEGIES[name], Judge(task), shown_seeds(task, seed)
    found: list[Regret] = []
    for part in [tuple(costs)] if strategy.is_anytime else [(cost,) for cost in costs]:
        clock = Clock(task, seeds, num_slots, seed)
        side = strategy.make(Setting(task, seed, num_slots, part[-1], lambda clock=clock: clock.now))
        found += [judge.regret(choice, seeds) for choice in clock.run(side, part)]
    return found


def shown_seeds(task: Task, seed: int) -> list[int]:
    """Return which recorded seed of each config a replay shows."""
    return [random.Random(f"{seed} {i}").randrange(len(point.curves)) for i, point in enumerate(task.points)]


def run(tasks: Sequence[Task], jobs: Sequence[Job], num_processes: int, keep: float = KEEP,
        seconds: float = math.inf) -> list[dict[str, Any]]:  # fmt: skip
    """Return one row for each task, strategy, number of slots and cost, with every replay's regret.

    keep: share of the table. seconds: no portion begins later; each row then has the replays of
    whole portions that all rows have.
    """
    rows: dict[tuple, dict[str, Any]] = {}
    begun, count = time.monotonic(), Counter()
    with multiprocessing.get_context("fork").Pool(num_processes, _begin, (tasks, keep, begun + seconds)) as pool:
        for job, seconds_used, regrets in pool.imap(_do, jobs):
            count[job.replays.start] += regrets is not None
            for at, cost in enumerate(job.costs if regrets is not None else ()):
                key = (tasks[job.task].name, job.strategy, job.num_slots, cost)
                row = rows.setdefault(key, dict(zip(("task", "strategy", "slots", "cost"), key), seen=[], judged=[], seconds=0.0))
                row["seen"] += [one[at].seen for one in regrets]
                row["judged"] += [one[at].judged for one in regrets]
                row["seconds"] += seconds_used / len(job.costs)
    first = jobs[0]._replace(replays=None)
    num_rows = sum(job.replays == jobs[0].replays for job in jobs)
    portions = [job.replays for job in jobs if job._replace(replays=None) == first]
    whole = sum(len(portion) for portion in portions if count[portion.start] == num_rows)
    for row in rows.values():
        row["seen"], row["judged"] = row["seen"][:whole], row["judged"][:whole]
    return list(rows.values())


def make_jobs(num_tasks: int, names: Sequence[str], slots: Sequence[int], costs: Sequence[float], num_replays: int) -> list[Job]:
    """Return all jobs, portion by portion."""
    portions = [range(first, min(first + PORTION, num_replays)) for first in range(0, num_replays, PORTION)]
    orders = itertools.product(portions, range(num_tasks), names, slots)
    return [Job(task, name, num_slots, tuple(sorted(costs)), portion) for portion, task, name, num_slots in orders]


_tasks: Sequence[Task] = ()
_keep, _ends = KEEP, math.inf


def _begin(tasks: Sequence[Task], keep: float, ends: float) -> None:
    global _tasks, _keep, _ends
    _tasks, _keep, _ends = tasks, keep, ends
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def _do(job: Job) -> tuple[Job, float, list[list[Regret]] | None]:
    """Return the job, its seconds of processor, and its regrets; None if there is no time left."""
    if time.monotonic() > _ends:
        return job, 0.0, None
    begun = time.process_time()
    found = [replay(_tasks[job.task], job.strategy, job.num_slots, job.costs, seed, _keep) for seed in job.replays]
    return job, time.process_time() - begun, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, help="folder with recorded curves, one file a task")
    parser.add_argument("--synthetic", nargs="*", choices=list(FAMILIES), default=[], help="made curves as tasks")
    parser.add_argument("--tasks", nargs="*", help="only these of the folder")
    parser.add_argument("--schedule", default="cosine", choices=["cosine", "constant"])
    parser.add_argument("--adapter", default="last", choices=ADAPTERS, help="whose losses count")
    parser.add_argument("--replays", type=int, default=100)
    parser.add_argument("--keep", type=float, default=KEEP, help="share of the table that each replay searches")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--costs", type=float, nargs="+", default=[2, 4, 8, 16], help="in full trials")
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--measure", default="seen", choices=["seen", "judged"], help="which regret the tables show")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no portion of replays after so many seconds")
    parser.add_argument("--json", type=Path, help="write every replay's regret there")
    options = parser.parse_args()
    tasks = read_tasks(options.curves, options.schedule, options.adapter) if options.curves else []
    tasks = [task for task in tasks if not options.tasks or task.name in options.tasks]
    tasks += [make_task(make_content(name)) for name in options.synthetic]
    if not tasks:
        parser.error("no task: give --curves or --synthetic")
    jobs = make_jobs(len(tasks), options.strategies, options.slots, options.costs, options.replays)
    rows = run(tasks, jobs, options.processes, options.keep, options.seconds)
    num_replays = len(rows[0]["seen"]) if rows else 0
    if not num_replays:
        parser.error(f"--seconds {options.seconds:g}: no portion of {PORTION} replays of everything was done")
    about = {"replays": num_replays, "keep": options.keep, "schedule": options.schedule, "adapter": options.adapter,
             "tasks": {task.name: len(task.points) for task in tasks}}  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"about": about, "rows": rows}) + "\n")
    print_tables(rows, options.measure)
    print("\n".join(comparison(rows, options.measure)))


if __name__ == "__main__":
    main()
