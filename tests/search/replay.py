"""Replay searches on recorded curves, and print how good the adapters are that they find.

    python -m tests.search.replay --curves tests/search/curves --replays 100 --json results.jsonl
    python -m tests.search.replay --synthetic usual sharp --strategies random_halving one_look

Cost is in full trials' tokens. Each replay has its own seed, searches a part of the table drawn by
that seed, and shows one of the recorded seeds of each config. All strategies get the same seeds. On
the whole table a strategy that draws nothing would do the same in every replay.

Each portion of replays is written as it ends. The same command with the same file goes on. What the
claims rest on comes first: ours and its peers at 1 and 4 slots and low costs.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import optuna

from .clock import Clock
from .measures import Judge, Regret
from .points import Task
from .recorded_tasks import ADAPTERS, make_task, read_tasks
from .result_lines import KEY, Portion, ResultFile, about, in_order, rows_of
from .strategies import STRATEGIES, Setting
from .synthetic import FAMILIES, make_content
from .table import HALVING, OURS, PEERS, comparison, print_tables

KEEP, FREE = 0.75, (0.0, 0.0)
PORTION = 5  # replays that a process does before it takes others
CLAIMED_SLOTS, CLAIMED_COST = (1, 4), 8  # of what is claimed


class Job(NamedTuple):
    """Name a portion of the replays of one strategy on one task."""

    task: str
    strategy: str
    num_slots: int
    costs: tuple[float, ...]
    replays: range


def replay(
    task: Task,
    name: str,
    num_slots: int,
    costs: Sequence[float],
    seed: int,
    keep: float = KEEP,
    setup: tuple[float, float] = FREE,
) -> list[Regret]:
    """Return the regret at each cost, ascending, of one replay. keep: share of the table that it searches. setup: see Clock."""
    task = task.part(keep, seed)
    strategy, judge, seeds = STRATEGIES[name], Judge(task), shown_seeds(task, seed)
    found: list[Regret] = []
    for part in [tuple(costs)] if strategy.is_anytime else [(cost,) for cost in costs]:
        clock = Clock(task, seeds, num_slots, seed, setup)
        side = strategy.make(Setting(task, seed, num_slots, part[-1], lambda clock=clock: clock.now, setup))
        found += [judge.regret(choice, seeds) for choice in clock.run(side, part)]
    return found


def shown_seeds(task: Task, seed: int) -> list[int]:
    """Return which recorded seed of each config a replay shows."""
    return [random.Random(f"{seed} {i}").randrange(len(point.curves)) for i, point in enumerate(task.points)]


def run(tasks: Sequence[Task], jobs: Sequence[Job], num_processes: int, keep: float = KEEP,
        seconds: float = math.inf, setup: tuple[float, float] = FREE) -> Iterator[Portion]:  # fmt: skip
    """Do the jobs and yield each one's regrets as it ends.

    keep: share of the table. seconds: no job begins later. setup: see Clock.
    """
    ends = time.monotonic() + seconds
    with multiprocessing.get_context("fork").Pool(num_processes, _begin, (tasks, keep, ends, setup)) as pool:
        yield from (portion for portion in pool.imap_unordered(_do, jobs) if portion is not None)


def make_jobs(
    tasks: Sequence[str], names: Sequence[str], slots: Sequence[int], costs: Sequence[float], num_replays: int
) -> list[Job]:
    """Return all jobs: first those that the claims need, and of these, portion by portion.

    One run of a strategy that decides the same whatever the cost serves all costs.
    """
    jobs = []
    for first, task, name, num_slots in itertools.product(range(0, num_replays, PORTION), tasks, names, slots):
        parts = [tuple(sorted(costs))] if STRATEGIES[name].is_anytime else [(cost,) for cost in sorted(costs)]
        jobs += [Job(task, name, num_slots, part, range(first, min(first + PORTION, num_replays))) for part in parts]
    return sorted(jobs, key=_urgency)


def undone(jobs: Sequence[Job], known: Sequence[Portion]) -> list[Job]:
    """Return the jobs of which a file does not hold all replays yet, cut to the costs that it lacks."""
    held = {tuple(row[name] for name in KEY): row["seen"] for row in rows_of(known)}

    def lacks(job: Job, cost: float) -> bool:
        return not set(job.replays) <= held.get((job.task, job.strategy, job.num_slots, cost), {}).keys()

    cut = [job._replace(costs=tuple(cost for cost in job.costs if lacks(job, cost))) for job in jobs]
    return [job for job in cut if job.costs]


def _urgency(job: Job) -> tuple[bool, bool]:
    is_large = job.num_slots not in CLAIMED_SLOTS or min(job.costs) > CLAIMED_COST
    return job.strategy not in (OURS, HALVING, *PEERS), is_large


_tasks: dict[str, Task] = {}
_keep, _ends, _setup = KEEP, math.inf, FREE


def _begin(tasks: Sequence[Task], keep: float, ends: float, setup: tuple[float, float]) -> None:
    global _tasks, _keep, _ends, _setup
    _tasks, _keep, _ends, _setup = {task.name: task for task in tasks}, keep, ends, setup
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def _do(job: Job) -> Portion | None:
    """Return the job's regrets; None if there is no time left."""
    if time.monotonic() > _ends:
        return None
    begun = time.process_time()
    found = [replay(_tasks[job.task], job.strategy, job.num_slots, job.costs, seed, _keep, _setup) for seed in job.replays]
    seen, judged = ([[getattr(one[at], name) for one in found] for at in range(len(job.costs))] for name in ("seen", "judged"))
    return Portion(
        job.task, job.strategy, job.num_slots, job.costs, job.replays.start, seen, judged, round(time.process_time() - begun, 3)
    )


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
    parser.add_argument("--setup", type=float, nargs=2, default=FREE, metavar=("BEGIN", "THAW"),
                        help="full trials that it costs to begin a trial, and to go on with one that left its slot")  # fmt: skip
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--measure", default="seen", choices=["seen", "judged"], help="which regret the tables show")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no portion of replays after so many seconds")
    parser.add_argument("--json", type=Path, help="write every replay's regret there, one line a portion; go on if it is there")
    options = parser.parse_args()
    tasks = read_tasks(options.curves, options.schedule, options.adapter) if options.curves else []
    tasks = [task for task in tasks if not options.tasks or task.name in options.tasks]
    tasks += [make_task(make_content(name)) for name in options.synthetic]
    if not tasks:
        parser.error("no task: give --curves or --synthetic")
    jobs = make_jobs([task.name for task in tasks], options.strategies, options.slots, options.costs, options.replays)
    what = about(options.keep, options.schedule, options.adapter, {task.name: len(task.points) for task in tasks}, options.setup)
    try:
        file = ResultFile(options.json, what)
    except ValueError as error:
        parser.error(str(error))
    portions = list(file.known)
    left = undone(jobs, portions)
    for portion in run(tasks, left, options.processes, options.keep, options.seconds, tuple(options.setup)) if left else ():
        file.add(portion)
        portions.append(portion)
    print(f"{len(jobs) - len(undone(jobs, portions))} of {len(jobs)} portions are done")
    rows = in_order(rows_of(portions), list(STRATEGIES))
    print_tables(rows, options.measure)
    print("\n".join(comparison(rows, options.measure)))


if __name__ == "__main__":
    main()
