"""Compare trials that multiply by the frozen base in INT8 with their twins in bf16.

    python -m tests.bench.matmul_quality --out quality0.jsonl --shard 0/4 --budget-s 350     # one process of 4
    python -m tests.bench.matmul_quality --table quality*.jsonl --json quality.json
    python -m tests.bench.matmul_quality --out tiny.jsonl --tiny --device cpu --limit 2      # the path, on a CPU

Two questions are asked of each mode. Does it change the last loss of a trial? Trials of two tasks,
three rates and five seeds each have a twin in each mode: same data, same first adapter, same order.
Does it change which config wins? The first 24 points of the recorded design are trained in each
mode, once. Losses are those of the last adapter, evaluated in 16 bits.

Each trial adds a line to the file, which says what it holds already, so the same command goes on
where it stopped. A process trains a few twins in one mode before it goes over to the next, because
they share recorded passes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
from scipy.special import stdtrit
from scipy.stats import spearmanr

from engine.config.matmul import Matmul
from engine.errors import InputError
from engine.system.command_line import run
from engine.system.shared_cache import CACHE_VARIABLE
from tests.search.curve_files import COMPLETE, cut_torn_line, read_lines
from tests.search.design import PlannedTrial, Variant, points
from tests.search.record import done_of, header_of, resident_base, scratch_disk, shard_name, write_line
from tests.search.recorded_trial import TINY, Failures, Scale, Setting, record_trial

TASKS = ("docs", "requests")
RATES, SEEDS, NUM_RANKED = (3e-4, 1e-3, 2e-3), 5, 24
SCALE = Scale(max_tokens=409_600, num_rungs=4, tokens_per_step=4096, eval_samples=256, eval_length=512, longest=1024)
IN_A_ROW = 4  # twins that a process trains in one mode
LEEWAY = 1.5
LIMIT = 0.002
"""Nats: `auto` may name a mode only if the interval of its difference lies within this of 0."""
FIXED = {"lora.rank": 16, "lora.target_modules": "all-linear", "alpha": "rslora8", "lora.lora_dropout": 0.0,
         "data.max_seq_length": 512}  # fmt: skip
PAIRED, RANKED = "paired", "ranked"


@dataclass(frozen=True)
class Twin:
    """Name a trial in one mode. part: PAIRED or RANKED."""

    part: str
    trial: PlannedTrial
    mode: Matmul

    @property
    def id(self) -> str:
        return f"{self.part}-{self.trial.id}-{self.mode}"


def planned(tasks: Sequence[str] = TASKS) -> list[PlannedTrial]:
    """Return the trials of which each mode trains a twin, the paired ones first."""
    paired = [
        PlannedTrial(task, number, Variant("cosine", seed), {**FIXED, "optim.learning_rate": rate}, 0)
        for seed in range(SEEDS)
        for task in tasks
        for number, rate in enumerate(RATES)
    ]
    ranked = [
        PlannedTrial(task, number, Variant("cosine", 0), point, 1 + number)
        for task in tasks
        for number, point in enumerate(points(NUM_RANKED))
    ]
    return paired + ranked


def shard(trials: Sequence[PlannedTrial], index: int, count: int) -> list[Twin]:
    """Return the twins of process `index` of `count`, in the order in which it trains them."""
    order: list[Twin] = []
    for part, chosen in ((PAIRED, [t for t in trials if not t.group]), (RANKED, [t for t in trials if t.group])):
        modes, mine, size = list(Matmul), chosen[index::count], IN_A_ROW if part == PAIRED else 1
        for start in range(0, len(mine), size):
            order += [Twin(part, trial, mode) for mode in modes for trial in mine[start : start + size]]
            modes.reverse()  # the next block begins in the mode that this one ends in
    return order


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(lambda: _main(_arguments(arguments)), stopped="stopped; the file has the finished trials")


def _main(options: argparse.Namespace) -> int:
    if options.table:
        found = summary([line for file in options.table for line in read_lines(file)])
        print(table(found))
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    if options.out is None:
        raise InputError("--out", None, "must name the file to add lines to")
    twins = shard(planned(), *options.shard)[: options.limit]
    print(f"{_train(options, twins)} trials trained; {options.out} has {len(done_of(read_lines(options.out)))}")
    return 0


def _train(options: argparse.Namespace, twins: list[Twin]) -> int:
    """Train the twins that the file lacks until the time is over; return how many."""
    deadline = time.monotonic() + options.budget_s
    cut_torn_line(options.out)
    known = done_of(read_lines(options.out))
    left = [twin for twin in twins if twin.id not in known]
    if not left:
        return 0
    with ExitStack() as stack:
        scratch = options.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quality-", dir=scratch_disk())))
        scratch.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault(CACHE_VARIABLE, str(scratch / "cache"))
        setting = Setting(options.model, TINY if options.tiny else SCALE, options.device, options.budget_gib, 0.0)
        base, failures, longest_s, count = resident_base(setting, left[0].trial), Failures(), 0.0, 0
        with options.out.open("a") as file:
            write_line(file, header_of(options, base))
            for twin in left:
                if time.monotonic() + LEEWAY * longest_s > deadline:
                    break
                found = record_trial(base, replace(setting, matmul=twin.mode.value), twin.trial, scratch)
                longest_s = max(longest_s if count else 0.0, found["seconds"])
                about = {"part": twin.part, "task": twin.trial.task, "mode": twin.mode.value}
                kept = ("config", "seed", "params", "outcome", "error", "tokens", "loss", "seconds")
                write_line(file, {"kind": "trial", **about, **{name: found[name] for name in kept}, "id": twin.id})
                print(f"{twin.id} {found['outcome']} {found['loss'][-1:]} {found['seconds']:.1f} s", flush=True)
                failures.note(found)
                count += 1
    return count


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the files say of each mode: its mean difference from bf16, and its ranking of configs.

    A pair counts if both of its trials are complete. Differences are in nats per target token.
    """
    trials = {line["id"]: line for line in lines if line["kind"] == "trial"}
    headers = [line for line in lines if line["kind"] == "header"]
    about = {key: headers[-1][key] for key in ("card", "model", "git.commit") if headers and key in headers[-1]}
    modes = [mode for mode in Matmul if mode is not Matmul.BF16]
    return {**about, "limit": LIMIT, "modes": {mode.value: _of_mode(list(trials.values()), mode) for mode in modes}}


def _of_mode(trials: list[dict[str, Any]], mode: Matmul) -> dict[str, Any]:
    paired, tasks = _pairs(trials, PAIRED, mode), sorted({one["task"] for one in trials})
    shown: dict[str, Any] = {"all": _difference(paired)}
    shown |= {f"task {task}": _difference([pair for pair in paired if pair[0]["task"] == task]) for task in tasks}
    rates = sorted({pair[0]["params"]["optim.learning_rate"] for pair in paired})
    for rate in rates:
        shown[f"rate {rate:g}"] = _difference([p for p in paired if p[0]["params"]["optim.learning_rate"] == rate])
    ranked = _pairs(trials, RANKED, mode)
    ranking = {task: _ranking([pair for pair in ranked if pair[0]["task"] == task]) for task in tasks}
    return {"differences": shown, "ranking": {task: found for task, found in ranking.items() if found}}


def _pairs(trials: list[dict[str, Any]], part: str, mode: Matmul) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return (bf16's trial, the mode's trial) where both were complete."""
    done = {(t["mode"], t["task"], t["config"], t["seed"]): t for t in trials if (t["part"], t["outcome"]) == (part, COMPLETE)}
    twins = {key: done.get((mode.value, *key[1:])) for key in done if key[0] == Matmul.BF16}
    return [(done[key], twin) for key, twin in sorted(twins.items()) if twin is not None]


def _difference(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any] | None:
    """Return mean, spread and 95 % interval (Student's) of the differences of last losses."""
    if len(pairs) < 2:
        return None
    values = numpy.array([ours["loss"][-1] - plain["loss"][-1] for plain, ours in pairs])
    spread = float(values.std(ddof=1))
    half = float(stdtrit(len(values) - 1, 0.975)) * spread / math.sqrt(len(values))
    mean = float(values.mean())
    within = abs(mean) + half <= LIMIT
    return {"mean": mean, "low": mean - half, "high": mean + half, "spread": spread, "pairs": len(values), "within": within}


def _ranking(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any] | None:
    """Return Spearman's correlation of the losses in two modes, and the config that each would choose.

    regret: what the choice costs in nats, by the losses of bf16.
    """
    if len(pairs) < 3:
        return None
    plain, ours = ([pair[side]["loss"][-1] for pair in pairs] for side in (0, 1))
    best, chosen = min(range(len(pairs)), key=plain.__getitem__), min(range(len(pairs)), key=ours.__getitem__)
    names = [pair[0]["config"] for pair in pairs]
    return {"spearman": float(spearmanr(plain, ours).statistic), "configs": len(pairs), "best": names[best],
            "chosen": names[chosen], "regret": plain[chosen] - plain[best]}  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """Return the summary as Markdown."""
    lines = ["| mode | trials | mean difference, nats | 95 % interval | spread | pairs |", "|---|---|---:|---:|---:|---:|"]
    for mode, of_mode in found["modes"].items():
        for name, one in of_mode["differences"].items():
            if one is not None:
                interval = f"{one['low']:+.5f} to {one['high']:+.5f}"
                lines.append(f"| {mode} | {name} | {one['mean']:+.5f} | {interval} | {one['spread']:.5f} | {one['pairs']} |")
    lines += ["", "| mode | task | configs | Spearman | bf16's best | chosen | regret |", "|---|---|---:|---:|---:|---:|---:|"]
    for mode, of_mode in found["modes"].items():
        for task, one in of_mode["ranking"].items():
            choice = f"{one['best']} | {one['chosen']} | {one['regret']:.5f}"
            lines.append(f"| {mode} | {task} | {one['configs']} | {one['spearman']:.4f} | {choice} |")
    about = ", ".join(f"{key} {value}" for key, value in found.items() if key not in ("modes", "limit"))
    return "\n".join([*lines, "", about])


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to add lines to")
    parser.add_argument("--shard", type=shard_name, default=(0, 1), help="i/n: every n-th trial and its twins, from i = 0")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="seconds from now, the model's loading included")
    parser.add_argument("--limit", type=int, help="at most so many trials")
    parser.add_argument("--model", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--budget-gib", type=float, default=18.0, help="device memory of this process")
    parser.add_argument("--tiny", action="store_true", help="a few steps a trial, to try the path")
    parser.add_argument("--scratch", type=Path, help="folder for cache and trials; default: temporary")
    parser.add_argument("--commit", help="commit to record if the code is not in a git checkout")
    parser.add_argument("--table", type=Path, nargs="+", help="print what these files say, and train nothing")
    parser.add_argument("--json", type=Path, help="with --table: write the numbers to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
