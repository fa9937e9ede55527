"""Measure how long whole sweeps take: the same trials through us, and through a process per trial.

    python -m tests.bench.makespan --model smollm2-135m --trials 16 --json FILE --scratch DIR
    python -m tests.bench.makespan --json FILE --scratch DIR --long --peer-path SITE --budget-s 540
    python -m tests.bench.makespan --json FILE --table

`ours` is `python -m sweep`. `unsloth` is Unsloth with TRL's SFTTrainer (packing on, 4-bit, their
gradient checkpointing, 8-bit AdamW), a new process for each trial, under Optuna with ASHA.
`peft-trl` is PEFT with TRL in the same way; it runs where Unsloth fails, or if --systems names it.

All get one folder of random NF4 weights, the same samples, trials, rungs and halving, and loss on
every token. The clock runs from the start of the first process to the end of the last. Caches of
compiled kernels begin empty. Ours measures its best adapter again on the clock; our calibration of
a new card, once a machine, is off. Rows of this card that FILE holds are not run again, except those
that a budget cut: the peers' trials that had ended in the same --scratch are kept. Nothing is extrapolated.
With --peers-at-once N, N of a peer's processes share the card, each with its part of the memory and
of the cores; ours has one worker all the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from engine.bench.process import scratch_folder
from engine.system.signals import handled
from tests.bench.makespan.job import Job, model_folder, write_samples
from tests.bench.makespan.table import table

SYSTEMS = ("ours", "unsloth", "peft-trl")
PLAIN, LONG = ("smollm2-135m", "llama-3.2-1b"), ("qwen2.5-7b",)
Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    options, refuse = _arguments(arguments)
    try:
        if options.table and not options.json.exists():
            raise ValueError(f"--json {options.json}: no such file, so --table has no rows to print")
        records = read(options.json)
        jobs = [] if options.table else checked_jobs(options)
    except (OSError, ValueError) as error:
        refuse(" ".join(str(error).split()))
    if not options.table:
        # a SIGTERM ends the trials' processes too
        with handled([signal.SIGTERM], lambda *_: sys.exit(143)), scratch_folder(options.scratch, "makespan-") as scratch:
            for record in measure(jobs, records, options, scratch):
                with options.json.open("a") as file:
                    file.write(json.dumps(record, sort_keys=True) + "\n")
                records.append(record)
    print(table(records))
    return 0


def read(file: Path) -> list[Record]:
    """Return the rows of the file, none if there is none. Raises ValueError for anything else than rows."""
    rows = []
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else (), 1):
        try:
            rows.append(json.loads(line))
            table(rows[-1:])
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f"--json {file}: line {number} is no row of this benchmark; take another file") from None
    return rows


def checked_jobs(options: argparse.Namespace) -> list[Job]:
    """Return the jobs. Raises ValueError for what no system could run, OSError if --json cannot be written."""
    from engine.bench.shapes import SHAPES  # loads torch

    models, rungs = [*options.model, *(LONG if options.long else ())], list(options.report_at)
    if unknown := [name for name in models if name not in SHAPES]:
        raise ValueError(f"--model {unknown[0]}: unknown shape; known: {', '.join(SHAPES)}")
    at_least_1 = ("trials", "length", "rows_at_once", "peers_at_once", "rows_per_step", "eval_samples", "child_timeout_s")
    for name in at_least_1:
        if not getattr(options, name) >= 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    if rungs != sorted(set(rungs)) or rungs[0] < 1:
        raise ValueError(f"--report-at {' '.join(map(str, rungs))}: must be above 0 and ascend")
    if not 0 <= options.cap_gib < math.inf:
        raise ValueError(f"--cap-gib {options.cap_gib}: must be at least 0")
    if options.budget_s is not None and not options.budget_s > 0:
        raise ValueError(f"--budget-s {options.budget_s}: must be above 0")
    if options.peer_path is not None and not options.peer_path.is_dir():
        raise ValueError(f"--peer-path {options.peer_path}: must be a folder")
    jobs = [_job(options, model) for model in models]
    jobs[0].points()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.open("a").close()
    return jobs


def is_done(record: Record) -> bool:
    """Return False for a row that a budget cut; a failure is a result."""
    return "error" in record or record["trials_ended"] >= record["trials"]


def wanted(jobs: list[Job], records: list[Record], systems: list[str] | None, at_once: int = 1) -> list[tuple[Job, str]]:
    """Return the rows to run now, in order. peft-trl waits until Unsloth has failed, unless systems names it.

    at_once: a peer's row with another number of processes is another row.
    """
    ended = [record for record in records if is_done(record) and at_once_of(record) in (at_once, None)]
    done = {(json.dumps(record["job"], sort_keys=True), record["system"]): record for record in ended}
    rows = []
    for job in jobs:
        key = json.dumps(job.key(), sort_keys=True)
        failed = "error" in done.get((key, "unsloth"), {})
        chosen = systems or [name for name in SYSTEMS if name != "peft-trl" or failed]
        rows += [(job, name) for name in chosen if (key, name) not in done]
    return rows


def at_once_of(record: Record) -> int | None:
    """Return how many of a peer's processes shared the card; None for ours, which has one worker."""
    return None if record["system"] == "ours" else record.get("peers_at_once", 1)


def measure(jobs: list[Job], records: list[Record], options: argparse.Namespace, scratch: Path) -> Any:
    """Yield a record for each row, until the budget is used up. What is left of it is shared by the rows to come."""
    began_s, tried, facts = time.monotonic(), set(), _facts(scratch, options)
    known = [record for record in records if record["card"] == facts["card"]]  # another card's rows are other rows
    while rows := [row for row in wanted(jobs, known, options.systems, options.peers_at_once) if row not in tried]:
        left_s = None if options.budget_s is None else options.budget_s - (time.monotonic() - began_s)
        if left_s is not None and left_s <= 0.0:
            print(f"--budget-s {options.budget_s:g} is used up; rows not run:")
            print("\n".join(f"  {job.model}, {system}" for job, system in rows))
            return
        job, system = rows[0]
        print(f"{job.model}: {job.trials} trials through {system}", flush=True)
        tried.add(rows[0])
        found = _run(job, system, options, scratch, None if left_s is None else left_s / len(rows), facts)
        record = whole_record(job, system, found, facts, None if left_s is None else left_s / len(rows))
        known.append(record)
        yield record


def whole_record(job: Job, system: str, found: Record, facts: Record, budget_s: float | None) -> Record:
    """Return the row: what ran, what it took, and where."""
    ended = sum(found.get("outcomes", {}).values()) - found.get("outcomes", {}).get("STOPPED", 0)
    speed = found["tokens"] / found["wall_s"] if found.get("tokens") and found.get("wall_s") else None
    what = {"job": job.key(), "model": job.model, "trials": job.trials, "system": system, "budget_s": budget_s}
    return {**what, **facts, **found, "trials_ended": ended, "tokens_per_second": speed}


def _run(job: Job, system: str, options: argparse.Namespace, scratch: Path, budget_s: float | None, facts: Record) -> Record:
    from tests.bench.makespan.ours import run_ours
    from tests.bench.makespan.peers import Peers

    on_card, at_once = facts["card"] != "CPU", options.peers_at_once
    shared = {} if system == "ours" else {"peers_at_once": at_once}
    try:
        model, samples = model_folder(job, scratch, options.child_timeout_s), write_samples(job, scratch)
        if system == "ours":
            where = Path(tempfile.mkdtemp(prefix=f"{system}-{job.model}-", dir=scratch))
            return run_ours(job, model, samples, where, options.child_timeout_s * job.trials, budget_s, on_card)
        path = options.peer_path.resolve() if options.peer_path else None
        what = json.dumps([job.key(), str(path), facts["card"], facts["git.commit"], at_once], sort_keys=True)
        where = scratch / f"{system}-{job.model}-{hashlib.sha256(what.encode()).hexdigest()[:12]}"
        peers = Peers(system, job, model, samples, where, path, options.child_timeout_s, on_card, at_once=at_once)
        return {**peers.run(budget_s), **shared}
    except (OSError, RuntimeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}", **shared}


def _facts(scratch: Path, options: argparse.Namespace) -> Record:
    from engine.bench.children import card_name
    from engine.system.provenance import provenance

    facts = {"card": card_name(scratch), "git.commit": "", **provenance()}
    return {**facts, **({"git.commit": options.commit} if options.commit else {})}


def _job(options: argparse.Namespace, model: str) -> Job:
    given = {name: getattr(options, name) for name in (field.name for field in fields(Job)) if name != "model"}
    return Job(model=model, **{**given, "report_at": tuple(given["report_at"]), "cap_gib": given["cap_gib"] or None})


def _arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, Callable[[str], NoReturn]]:
    """Return the options, and what ends the process with one line about them."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.makespan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    job = Job()
    parser.add_argument("--model", nargs="+", default=list(PLAIN), help="shapes that engine.bench knows")
    parser.add_argument("--long", action="store_true", help=f"{', '.join(LONG)} too")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help="default: ours and unsloth; peft-trl where unsloth fails")
    parser.add_argument("--trials", type=int, default=job.trials)
    parser.add_argument("--seed", type=int, default=job.seed, help="of samples, learning rates and the order of trials")
    parser.add_argument(
        "--report-at", type=int, nargs="+", default=job.report_at, help="tokens at each rung; the last is the budget"
    )
    parser.add_argument("--length", type=int, default=job.length, help="tokens in a packed row")
    parser.add_argument("--rows-at-once", type=int, default=job.rows_at_once, help="of peers; ours chooses by itself")
    parser.add_argument("--peers-at-once", type=int, default=1, help="processes of a peer that share the card")
    parser.add_argument("--rows-per-step", type=int, default=job.rows_per_step)
    parser.add_argument("--eval-samples", type=int, default=job.eval_samples)
    parser.add_argument("--cap-gib", type=float, default=job.cap_gib, help="emulate a smaller card for all systems; 0: do not")
    parser.add_argument("--json", type=Path, required=True, help="file that gets a line as soon as a row is done")
    parser.add_argument("--scratch", type=Path, help="folder for models, samples and trials; default: temporary")
    parser.add_argument(
        "--peer-path", type=Path, help="folder of packages that comes first in PYTHONPATH of the peers' processes"
    )
    parser.add_argument("--child-timeout-s", type=float, default=900.0, help="time limit per trial; for ours, times the trials")
    parser.add_argument("--budget-s", type=float, help="start no trial after this time; running ones end at their next rung")
    parser.add_argument("--commit", help="commit to record if the code is not in a git checkout")
    parser.add_argument("--table", action="store_true", help="only print what the file holds")
    return parser.parse_args(arguments), parser.error


if __name__ == "__main__":
    sys.exit(main())
