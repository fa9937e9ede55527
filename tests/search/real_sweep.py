"""Run real sweeps with equal tokens, ours against random + ASHA, and compare the adapters.

    python -m tests.search.real_sweep --json FILE --scratch DIR --budget-s 480     # on a card
    python -m tests.search.real_sweep --json FILE --table

Each row is one `python -m sweep`, as a user starts it: `sampler=freeze_thaw`, which begins with the
prior, or `sampler=random` with `pruner=successive_halving` at factor 4. That is asynchronous
successive halving by our rule, not Ray's own scheduler: a sweep cannot name that one. The loss is
that of the second measurement, from the files of the winner. Tasks are those of the recorded curves.

`--equal hours`, the default: freeze and thaw has the tokens of some full trials, set-ups included. The
other sweep starts at the same moment on the same card without a limit. When freeze and thaw has ended,
`python -m sweep.control FOLDER budget gpu_hours=...` gives the other one the hours that it took.
`--equal tokens`: both have the same tokens, and set-ups are nobody's cost.

Sweeps of one budget run at once and share the card; a system's seconds are comparable within a
budget alone. Rows that FILE holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.bench.process import ENVIRONMENT, ROOT
from engine.trial_report import read_reports
from sweep.folder.timeline import Timeline
from tests.bench.makespan.ours import wait_or_end
from tests.search.design import DROPOUTS, RANKS, RATES, TARGETS
from tests.search.recorded_trial import FULL, TINY, Scale
from tests.search.tasks import TASKS, data_of

OURS, OTHER = "freeze_thaw", "random_asha"
SYSTEMS = {
    OURS: ["sampler=freeze_thaw"],
    OTHER: ["sampler=random", "pruner=successive_halving", "pruner.reduction_factor=4"],
}
MANY = 1000  # trials: the tokens or the hours end the sweep
NAME = "real"
HOURS, TOKENS = "hours", "tokens"
WITHOUT_SETUPS = 16  # with equal hours, the other sweep may see so many times the tokens of ours


@dataclass(frozen=True)
class Race:
    """Name one sweep. budget: full trials' tokens. equal: what both sweeps of a pair have alike."""

    task: str
    budget: float
    seed: int
    system: str
    max_tokens: int
    equal: str = TOKENS

    @property
    def follows(self) -> bool:
        """Return whether the sweep ends when the one of the other system has taken as long."""
        return self.equal == HOURS and self.system == OTHER


def overrides(race: Race, scale: Scale, output: Path, options: argparse.Namespace) -> list[str]:
    """Return the overrides of the sweep's config."""
    train, held_out = data_of(race.task)
    data = {"train": train, "eval": held_out, "eval_max_samples": scale.eval_samples, "eval_max_seq_length": scale.eval_length}
    lengths = [length for length in TASKS[race.task].lengths if length <= scale.longest]
    space = {"lora.rank": RANKS, "lora.target_modules": TARGETS, "lora.lora_dropout": DROPOUTS, "data.max_seq_length": lengths}
    slots = ["cluster.num_gpus=1"] if options.device == "cuda" else ["cluster.num_cpu_slots=1"]
    return [
        "model=smollm2-135m", *([f"model.path={options.model}"] if options.model else []), "data=local",
        *(f"data.{name}={value}" for name, value in {**data, **TASKS[race.task].data}.items()),
        "space=none", *(f"space.{path}.choices={_text(values)}" for path, values in space.items()),
        f"space.optim.learning_rate={{low: {RATES[0]}, high: {RATES[1]}, log: true}}", *SYSTEMS[race.system],
        f"train.max_tokens={race.max_tokens}", f"train.num_reports={scale.num_rungs}",
        f"train.tokens_per_step={scale.tokens_per_step}", f"train.seed={race.seed}", f"train.device={options.device}",
        *([f"train.memory_budget_gib={options.budget_gib}"] if options.device == "cuda" else []),
        f"sweep.seed={race.seed}", f"sweep.num_trials={MANY}",
        f"sweep.budget.full_trials={race.budget * (WITHOUT_SETUPS if race.follows else 1):g}",
        f"sweep.name={NAME}", f"sweep.output_dir={output}", "sweep.num_examples=0", "tracking=none",
        "cluster.calibrate=false", *slots,
    ]  # fmt: skip


def run_sweep(
    race: Race, scale: Scale, options: argparse.Namespace, scratch: Path, timeout_s: float, ours: Future | None = None
) -> dict[str, Any]:
    """Run one sweep; return its row, with `error` if it failed. ours: gives the row of the sweep that this one follows."""
    where = Path(tempfile.mkdtemp(prefix=f"{race.system}-{race.budget:g}-{race.seed}-", dir=scratch))
    given = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(ROOT), *given])}
    command, log = [sys.executable, "-m", "sweep", *overrides(race, scale, where / "sweeps", options)], where / "sweep.log"
    began_s = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, cwd=where, stdout=out, stderr=subprocess.STDOUT)
        if ours is not None:
            _give_hours(process, where / "sweeps", ours, began_s + timeout_s)
        code = wait_or_end(process, max(0.0, began_s + timeout_s - time.monotonic()))
    row = {**asdict(race), "wall_s": time.monotonic() - began_s, "device": options.device}
    if code == 0:
        (folder,) = (where / "sweeps").glob(f"{NAME}-*")
        return {**row, **read_sweep(folder)}
    lines = [line for line in log.read_text().splitlines() if line.strip()] or [f"exit code {code}"]
    return {**row, "error": "timed out" if code is None else lines[-1]}


def _give_hours(process: subprocess.Popen, output: Path, ours: Future, deadline: float) -> None:
    """Wait for our sweep, then limit this one to its seconds. Where ours failed, this one is ended."""
    wait([ours], min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX))
    row = ours.result() if ours.done() else None
    if row is None or "error" in row:
        process.send_signal(signal.SIGTERM)
    elif process.poll() is None:
        (folder,) = output.glob(f"{NAME}-*")
        words = ["sweep.control", str(folder), "budget", f"gpu_hours={row['gpu_s'] / 3600:.7f}"]
        told = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
        print(*words, told.returncode, told.stdout.strip(), told.stderr.strip(), flush=True)


def read_sweep(folder: Path) -> dict[str, Any]:
    """Return what a finished sweep found and what it took."""
    board = json.loads((folder / "leaderboard.json").read_text())
    timeline, now_s = Timeline(folder / "timeline.jsonl", mend=False), time.time()
    reports = {row["number"]: list(read_reports(Path(row["folder"]))) for row in board["trials"]}
    best = next(row for row in board["trials"] if row["number"] == board["best_trial"])
    return {
        "eval_loss": board["reevaluation"]["eval_loss"],
        "base_eval_loss": board["reevaluation"]["base_eval_loss"],
        "best": best["params"],
        "best_outcome": best["outcome"],
        "outcomes": board["outcomes"],
        "tokens": sum(found[-1].tokens_seen for found in reports.values() if found),
        "gpu_s": timeline.occupied_s(now_s),
        "sweep_s": timeline.elapsed_s(now_s),
    }


def run_all(races: Sequence[Race], options: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """Yield each row as its sweep ends. Sweeps of one budget start together, at most --at-once; none starts too late."""
    scale, deadline = TINY if options.tiny else FULL, time.monotonic() + options.budget_s
    for task in dict.fromkeys(race.task for race in races):  # made once, before the sweeps share it
        data_of(task)
    for budget in dict.fromkeys(race.budget for race in races):
        with ThreadPoolExecutor(options.at_once) as pool:
            begun: dict[Race, Future] = {}
            for race in races:  # in order: ours begins before the one that follows it
                if race.budget == budget:
                    ours = begun[replace(race, system=OURS)] if race.follows else None
                    begun[race] = pool.submit(_in_time, race, scale, options, scratch, deadline, ours)
            for done in as_completed(begun.values()):
                if done.result() is not None:
                    yield done.result()


def _in_time(
    race: Race, scale: Scale, options: argparse.Namespace, scratch: Path, deadline: float, ours: Future | None
) -> dict[str, Any] | None:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        print(f"--budget-s is used up; not run: {race}", flush=True)
        return None
    return run_sweep(race, scale, options, scratch, left_s, ours)


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a Markdown table: for each task and budget the losses of both systems, seed by seed."""
    lines = ["| task, full trials | system | " + "loss of the winner, by seed | mean | trials | tokens | GPU s | sweep s |"]
    lines.append("|---|---|---|---:|---:|---:|---:|---:|")
    for kind in sorted({_kind(row) for row in rows}):
        of_kind, name = [row for row in rows if _kind(row) == kind], _name(*kind)
        for system in SYSTEMS:
            own = sorted((row for row in of_kind if row["system"] == system and "error" not in row), key=lambda row: row["seed"])
            if own:
                losses = ", ".join(f"{row['eval_loss']:.4f} (seed {row['seed']})" for row in own)
                counts = [sum(row["outcomes"].values()) for row in own]
                means = [_mean([row[name] for row in own]) for name in ("tokens", "gpu_s", "sweep_s")]
                numbers = [f"{_mean(counts):.1f}", f"{means[0]:,.0f}", f"{means[1]:.1f}", f"{means[2]:.1f}"]
                loss = f"{_mean([row['eval_loss'] for row in own]):.4f}"
                lines.append(f"| {name} | {system} | {losses} | {loss} | {' | '.join(numbers)} |")
        failed = [row for row in of_kind if "error" in row]
        lines += [f"| {name} | {row['system']} | failed: {row['error']} | | | | | |" for row in failed]
    return [*lines, "", *_differences(rows)]


def _differences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each kind of race: by how much ours ends lower, seed by seed."""
    known = {(_kind(row), row["seed"], row["system"]): row["eval_loss"] for row in rows if "error" not in row}
    gaps: dict[tuple, list[float]] = {}
    for kind, seed, system in sorted(known):
        if system == OURS and (kind, seed, OTHER) in known:
            gaps.setdefault(kind, []).append(known[kind, seed, OTHER] - known[kind, seed, OURS])
    return [
        f"{_name(*kind)}: {OTHER} is above {OURS} by "
        f"{', '.join(f'{1000 * gap:+.1f}' for gap in found)} e-3 nats, mean {1000 * _mean(found):+.1f}"
        for kind, found in gaps.items()
    ]


def _kind(row: dict[str, Any]) -> tuple[str, int, str, float]:
    return row["task"], row["max_tokens"], row.get("equal", TOKENS), row["budget"]


def _name(task: str, max_tokens: int, equal: str, budget: float) -> str:
    return f"{task}, {budget:g} of {max_tokens:,} tokens, {equal}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _text(value: Any) -> str:
    """Write a value as Hydra's command line reads it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_text(part)}" for name, part in value.items()) + "}"
    return "[" + ",".join(map(_text, value)) + "]" if isinstance(value, list | tuple) else str(value)


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()] if file.is_file() else []


def left_of(races: Sequence[Race], rows: Sequence[dict[str, Any]]) -> list[Race]:
    """Return the races to run. Where hours are equal, both of a pair run, or neither."""
    done = {Race(**{name: row[name] for name in Race.__annotations__ if name in row}) for row in rows if "error" not in row}
    left = {race for race in races if race not in done}
    pairs = {replace(race, system=system) for race in left if race.equal == HOURS for system in SYSTEMS}
    return [race for race in races if race in left | pairs]


def main(arguments: list[str] | None = None) -> int:
    options = _arguments(arguments)
    rows = read_rows(options.json)
    if not options.table:
        max_tokens = options.max_tokens or (TINY if options.tiny else FULL).max_tokens
        races = [Race(task, budget, seed, system, max_tokens, options.equal) for task in options.task
                 for budget in options.budgets for seed in options.seeds for system in SYSTEMS]  # fmt: skip
        options.json.parent.mkdir(parents=True, exist_ok=True)
        if options.scratch:
            options.scratch.mkdir(parents=True, exist_ok=True)
        with nullcontext(options.scratch) if options.scratch else tempfile.TemporaryDirectory(prefix="real-") as scratch:
            for row in run_all(left_of(races, rows), options, Path(scratch).resolve()):
                row |= {"card": options.card, "git.commit": options.commit}
                with options.json.open("a") as file:
                    file.write(json.dumps(row, sort_keys=True) + "\n")
                rows.append(row)
                print({name: row.get(name) for name in ("system", "budget", "seed", "eval_loss", "wall_s", "error")}, flush=True)
    print("\n".join(table(rows)))
    return 0


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file that gets a line as soon as a sweep has ended")
    parser.add_argument("--scratch", type=Path, help="folder for the sweeps; default: temporary")
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=["docs"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[4, 8], help="in full trials, in this order")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of sweep and training")
    parser.add_argument("--equal", choices=(HOURS, TOKENS), default=HOURS, help="what both systems have alike")
    parser.add_argument("--max-tokens", type=int, help="of a full trial; default: as recorded")
    parser.add_argument("--at-once", type=int, default=6, help="sweeps that share the card")
    parser.add_argument("--budget-gib", type=float, default=12.0, help="device memory of each sweep")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="start no sweep later; running ones are ended")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", help="another model, for a try")
    parser.add_argument("--tiny", action="store_true", help="trials of a few steps, to try the path")
    parser.add_argument("--card", default="", help="name of the card to record")
    parser.add_argument("--commit", default="", help="commit to record")
    parser.add_argument("--table", action="store_true", help="only print what the file holds")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
