"""Record learning curves of real trials, for replays of searches.

    python -m tests.search.record --out shard0.jsonl --shard 0/12 --budget-s 500     # one process of 12
    python -m tests.search.record --dry-run --shard 0/12                             # what it would train
    python -m tests.search.record --out more0.jsonl --shard 0/4 --done shard*.jsonl  # later, the trials that are left
    python -m tests.search.record --merge tests/search/curves/*.gz shard*.jsonl      # into tests/search/curves/
    python -m tests.search.record --out tiny.jsonl --tiny --device cpu --limit 2     # the path, on a CPU

Trials run through the engine's own loop around one resident base model. Each adds a line to the
file, which says what it holds already, so the same command goes on where it stopped. A trial that
diverges or fails is recorded as such. Several processes may share a card.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from engine.errors import InputError
from engine.model.base import Base
from engine.model.device import pick_device
from engine.model.load import load_base
from engine.system.command_line import run
from engine.system.provenance import provenance
from engine.system.shared_cache import CACHE_VARIABLE
from tests.search import design
from tests.search.curve_files import CURVES, cut_torn_line, merge, read_lines, write_curves
from tests.search.design import PlannedTrial, planned, shard
from tests.search.recorded_trial import FAILED, FULL, TINY, Failures, Setting, config_of, record_trial, task_facts
from tests.search.tasks import LATER, TASKS

MEMORY_DISK, ROOM_GIB = Path("/dev/shm"), 24
LEEWAY = 1.5  # a trial begins if one that takes so many times as long as the last would end in time


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(lambda: _main(_arguments(arguments)), stopped="stopped; the file has the finished trials")


def _main(options: argparse.Namespace) -> int:
    if options.merge:
        for name, curves in merge(options.merge).items():
            write_curves(options.curves / f"{name}.json.gz", curves)
            print(f"{name}: {len(curves.trials)} trials, {(options.curves / f'{name}.json.gz').stat().st_size:,} bytes")
        return 0
    trials = _chosen(options)
    if options.dry_run:
        for trial in trials:
            print(trial.id, json.dumps(trial.params))
        print(f"{len(trials)} trials of {FULL.max_tokens:,} tokens, {len(trials) * FULL.max_tokens:,} in all")
        return 0
    if options.out is None:
        raise InputError("--out", None, "must name the file to add lines to")
    count = _record_all(options, trials)
    print(f"{count} trials recorded; {options.out} has {sum(line['kind'] == 'trial' for line in read_lines(options.out))}")
    return 0


def _chosen(options: argparse.Namespace) -> list[PlannedTrial]:
    """Return this process' trials in order."""
    names = options.task or list(TASKS)
    order = planned({name: TASKS[name].lengths for name in TASKS if name in names}, LATER if len(names) > 1 else ())
    done = {name for file in options.done for name in done_of(read_lines(file))}
    return shard([trial for trial in order if trial.id not in done], *options.shard)[: options.limit]


def done_of(lines: list[dict[str, Any]]) -> set[str]:
    """Return the trials that need not be recorded again; one that failed may go well the next time."""
    return {line["id"] for line in lines if line["kind"] == "trial" and line["outcome"] != FAILED}


def _record_all(options: argparse.Namespace, trials: list[PlannedTrial]) -> int:
    """Record the trials that the file lacks until the time is over; return how many."""
    deadline = time.monotonic() + options.budget_s
    cut_torn_line(options.out)
    known = read_lines(options.out)
    left = [trial for trial in trials if trial.id not in done_of(known)]
    if not left:
        return 0
    with ExitStack() as stack:
        scratch = options.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="record-", dir=scratch_disk())))
        scratch.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault(CACHE_VARIABLE, str(scratch / "cache"))
        setting = Setting(options.model, TINY if options.tiny else FULL, options.device, options.budget_gib, options.ema_horizon)
        base = resident_base(setting, left[0])
        stack.callback(gc.unfreeze)
        with options.out.open("a") as file:
            write_line(file, header_of(options, base))
            told = {line["name"] for line in known if line["kind"] == "task"}
            count = 0
            for line in _lines(base, setting, left, scratch, deadline, told):
                write_line(file, line)
                count += line["kind"] == "trial"
    return count


def _lines(
    base: Base, setting: Setting, left: list[PlannedTrial], scratch: Path, deadline: float, told: set[str]
) -> Iterator[dict[str, Any]]:
    """Yield a task's facts before its first trial, and each trial, as long as the next one will end in time."""
    failures, last_s = Failures(), 0.0
    for trial in left:
        if time.monotonic() + LEEWAY * last_s > deadline:
            return
        if trial.task not in told:
            told.add(trial.task)
            yield {"kind": "task", **task_facts(base, setting, trial)}
        found = record_trial(base, setting, trial, scratch)
        last_s = found["seconds"]
        yield {"kind": "trial", "task": trial.task, **found}
        loss = f"{found['loss'][-1]:.4f}" if found["loss"] else "-"
        print(f"{trial.id} {found['outcome']} {loss} {found['seconds']:.1f} s", flush=True)
        failures.note(found)


def resident_base(setting: Setting, trial: PlannedTrial) -> Base:
    base = load_base(config_of(setting, trial).model, pick_device(setting.device))
    gc.collect()
    gc.freeze()  # the engine collects after each trial, and need not search model and libraries then
    return base


def header_of(options: argparse.Namespace, base: Base) -> dict[str, Any]:
    card = torch.cuda.get_device_name() if base.device.type == "cuda" else "CPU"
    facts = {"card": card, "model": options.model, "design": design.digest(), **provenance()}
    facts |= {"git.commit": options.commit} if options.commit else {}
    facts |= {"processes": options.shard[1], "memory_budget_gib": options.budget_gib}
    return {"kind": "header", "shard": options.shard[0], **facts}


def write_line(file: Any, line: dict[str, Any]) -> None:
    file.write(json.dumps(line, separators=(",", ":")) + "\n")
    file.flush()


def scratch_disk() -> Path | None:
    """Return the disk in memory if it has room for many processes' checkpoints; else None, the usual place."""
    is_large = MEMORY_DISK.is_dir() and shutil.disk_usage(MEMORY_DISK).free >= ROOM_GIB * 2**30
    return MEMORY_DISK if is_large else None


def shard_name(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError("must be i/n with 0 <= i < n")
    return int(index), int(count)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to add lines to")
    parser.add_argument("--shard", type=shard_name, default=(0, 1), help="i/n: every n-th group of trials, from i = 0")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="seconds from now, the model's loading included")
    parser.add_argument("--done", type=Path, nargs="+", default=[], help="lines or tasks' files: no process records these trials")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="only this task; may be given again")
    parser.add_argument("--limit", type=int, help="at most so many trials")
    parser.add_argument("--model", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--budget-gib", type=float, default=18.0, help="device memory of this process")
    parser.add_argument("--ema-horizon", type=float, default=0.1, help="of the running average; 0: no average")
    parser.add_argument("--tiny", action="store_true", help="a few steps a trial, to try the path")
    parser.add_argument("--scratch", type=Path, help="folder for cache and trials; default: temporary")
    parser.add_argument("--commit", help="commit to record if the code is not in a git checkout")
    parser.add_argument("--dry-run", action="store_true", help="print the trials in their order, and train none")
    parser.add_argument("--merge", type=Path, nargs="+", help="put lines and files of tasks together, one file a task")
    parser.add_argument("--curves", type=Path, default=CURVES, help="folder that --merge writes to")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
