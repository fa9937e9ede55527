"""Measures the driver's decisions and its memory: the real searcher, scheduler, ledger, study and journal, without Ray.

    python tests/bench/sweep_decisions.py --trials 10000 --slots 16
    python tests/bench/sweep_decisions.py --stock      the same trials decided by stock OptunaSearch and ASHAScheduler

A simulated clock plays trials whose learning curves follow from their config (no training, no waiting), so that ten thousand
take minutes. What is timed is what Tune's loop would wait for: `suggest` (the next trial), `report` (on_trial_result: go on or
stop), `end` (on_trial_complete). A script and no test: a percentile on a shared machine is a measurement, not a truth. Beside the
tests, because nothing of it is to be installed.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from sweep.config.sweep import SweepConfig, parse_sweep_config
from sweep.execution.scheduler import LedgerScheduler
from sweep.execution.searcher import LedgerSearcher
from sweep.folder.sweep_folder import SweepFolder
from sweep.ledger.freezer import make_freezer
from sweep.ledger.ledger import Ledger
from sweep.ledger.limits import Limits
from sweep.space.parse import parse_space
from sweep.study.study import Study

NUM_RUNGS = 8
SPACE = {
    "lora.rank": {"choices": [4, 8, 16, 32, 64]},
    "lora.target_modules": {"choices": {"attention": ["q_proj", "v_proj"], "mlp": ["up_proj", "down_proj"], "all": "all-linear"}},
    "lora.lora_dropout": {"low": 0.0, "high": 0.3},
    "optim.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
}
KINDS = ("suggest", "report", "end")


class Stopwatch:
    """Milliseconds by kind of decision: on the clock, and on the processor, which other work on the machine does not lengthen."""

    def __init__(self) -> None:
        self.taken_ms: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}

    def measure(self, kind: str, call: Any, *arguments: Any, **options: Any) -> Any:
        begun, used = time.perf_counter(), time.thread_time()
        answer = call(*arguments, **options)
        self.taken_ms[kind].append((1000.0 * (time.perf_counter() - begun), 1000.0 * (time.thread_time() - used)))
        return answer

    def table(self, since: dict[str, int] | None = None) -> list[str]:
        lines = []
        for kind in KINDS:
            pairs = self.taken_ms[kind][(since or {}).get(kind, 0) :]
            for name, taken in (("clock", [wall for wall, _ in pairs]), ("processor", [cpu for _, cpu in pairs])):
                taken.sort()
                cells = "  ".join(f"p{q:g} {_percentile(taken, q):6.2f}" for q in (50, 90, 99, 99.9))
                head = f"  {kind:<8} {name:<9} {len(taken):>7,} x"
                lines.append(f"{head}  {cells}  max {taken[-1]:7.2f}  mean {statistics.mean(taken):6.2f} ms")
        return lines


def curve(params: dict[str, Any], rng: random.Random) -> list[float]:
    """A learning curve: a power law whose floor depends on the config, with some noise."""
    away = abs(math.log10(params["optim.learning_rate"] / 3e-4))
    floor = 1.5 + 0.2 * away + 0.3 / params["lora.rank"] + params["lora.lora_dropout"]
    return [floor + 0.8 * rung**-0.6 + rng.gauss(0.0, 0.01) for rung in range(1, NUM_RUNGS + 1)]


def report_at(rung: int, loss: float, best: float, elapsed_s: float) -> dict[str, Any]:
    """All fields of a report, as they fill a driver's memory."""
    unchanging = {
        "grad_norm": 1.0, "tokens_per_second": 100.0, "step_time_ms": 9.0, "peak_allocated_gib": 1.0, "num_trainable": 1000,
        "predicted_peak_gib": 1.0, "num_out_of_memory": 0, "micro_batch_size": 1, "setup_s": 0.1,
    }  # fmt: skip
    return unchanging | {
        "rung": rung, "tokens_seen": 1000 * rung, "target_tokens_seen": 900 * rung, "step": rung, "epoch": 0.1 * rung,
        "train_loss": loss, "eval_loss": loss, "best_eval_loss": best, "learning_rate": 1e-4, "elapsed_s": elapsed_s,
    }  # fmt: skip


class Ours:
    """This project's decisions, with their journal and files."""

    def __init__(self, path: Path, config: SweepConfig, num_slots: int, clock: Callable[[], float], watch: Stopwatch) -> None:
        self._folder, self._watch, space = SweepFolder(path), watch, parse_space(config.space)
        study, limits = Study(self._folder, config, space), Limits(
            num_trials=config.sweep.num_trials, num_rungs=NUM_RUNGS, num_slots=num_slots, max_retries=2,
            budget=config.effective_budget, grid=config.train.report_grid(),
        )  # fmt: skip
        freezer = make_freezer(config, space, study, limits)
        self._ledger = Ledger(study, self._folder, limits, freezer=freezer, clock=clock)
        self._ledger.recover()
        self._searcher = LedgerSearcher(self._ledger, lambda proposal: {"number": proposal.number, "params": proposal.params})
        self._scheduler = LedgerScheduler(self._ledger)

    def suggest(self, trial_id: str) -> tuple[int, dict[str, Any]] | None:
        """The next trial's number and params; None where there is none now."""
        config = self._watch.measure("suggest", self._searcher.suggest, trial_id)
        if not isinstance(config, dict):
            self._watch.taken_ms["suggest"].pop()  # no trial was proposed
            return None
        return config["number"], config["params"]

    def reported(self, number: int, trial_id: str, seen: list[dict[str, Any]], now_s: float) -> bool:
        """The newest of its reports; returns whether the trial goes on."""
        (self._folder.trial(number) / "reports.jsonl").write_text("".join(json.dumps(one) + "\n" for one in seen))
        done = len(seen) == NUM_RUNGS
        timing = json.dumps({"slot": "bench", "began_s": now_s, "dead_time_s": 0.1})
        result = {
            "outcome": "COMPLETE" if done else "RUNNING", "report": json.dumps(seen[-1]), "error": None, "memory": "{}",
            "timing": timing, "done": done,
        }  # fmt: skip
        if not done:
            trial = SimpleNamespace(config={"number": number})
            if self._watch.measure("report", self._scheduler.on_trial_result, None, trial, result) != LedgerScheduler.STOP:
                return True
        self._watch.measure("end", self._searcher.on_trial_complete, trial_id, result)
        return False

    def outcomes(self) -> list[str]:
        return [str(record.outcome) for record in self._ledger.records]


class Stock:
    """Ray Tune's own, which keep the study in memory: the same calls, as its controller makes them."""

    def __init__(self, num_trials: int, watch: Stopwatch) -> None:
        distributions = {
            "lora.rank": tune.choice([4, 8, 16, 32, 64]), "lora.target_modules": tune.choice(["attention", "mlp", "all"]),
            "lora.lora_dropout": tune.uniform(0.0, 0.3), "optim.learning_rate": tune.loguniform(1e-5, 1e-2),
        }  # fmt: skip
        self._searcher = OptunaSearch(OptunaSearch.convert_search_space(distributions), metric="eval_loss", mode="min", seed=0)
        self._scheduler = ASHAScheduler(metric="eval_loss", mode="min", max_t=NUM_RUNGS, grace_period=1, reduction_factor=4)
        self._watch, self._left, self._outcomes = watch, num_trials, []
        self._trials: dict[str, Any] = {}

    def suggest(self, trial_id: str) -> tuple[int, dict[str, Any]] | None:
        if not self._left:
            return None
        self._left -= 1
        params = self._watch.measure("suggest", self._searcher.suggest, trial_id)
        self._trials[trial_id] = SimpleNamespace(trial_id=trial_id)
        self._scheduler.on_trial_add(None, self._trials[trial_id])
        return len(self._trials), params

    def reported(self, number: int, trial_id: str, seen: list[dict[str, Any]], now_s: float) -> bool:
        result = {**seen[-1], "training_iteration": len(seen), "trial_id": trial_id}

        def report() -> str:
            self._searcher.on_trial_result(trial_id, result)
            return self._scheduler.on_trial_result(None, self._trials[trial_id], result)

        done = len(seen) == NUM_RUNGS
        if not done and self._watch.measure("report", report) != ASHAScheduler.STOP:
            return True
        self._outcomes.append("ended early" if not done else "COMPLETE")

        def end() -> None:
            self._scheduler.on_trial_complete(None, self._trials[trial_id], result)
            self._searcher.on_trial_complete(trial_id, result)

        self._watch.measure("end", end)
        return False

    def outcomes(self) -> list[str]:
        return self._outcomes


class Simulation:
    """One sweep on a clock that jumps from event to event."""

    def __init__(self, num_slots: int) -> None:
        self.now_s, self.rng, self.watch = 0.0, random.Random(0), Stopwatch()
        self._num_slots, self.num_started = num_slots, 0

    def run(self, side: Ours | Stock, progress: Callable[[Simulation], None]) -> None:
        events: list[tuple[float, int, str, list[float], list[dict[str, Any]]]] = []
        known: dict[int, tuple[list[float], list[dict[str, Any]]]] = {}  # a paused trial goes on from its reports
        while True:
            while len(events) < self._num_slots:
                trial_id = f"t{self.num_started}"
                found = side.suggest(trial_id)
                if found is None:
                    break
                self.num_started += 1
                number, params = found
                losses, seen = known.get(number) or known.setdefault(number, (curve(params, self.rng), []))
                heapq.heappush(events, (self.now_s + self.rng.uniform(50, 100), number, trial_id, losses, seen))
                progress(self)
            if not events:
                return
            self.now_s, number, trial_id, losses, seen = heapq.heappop(events)
            rung = len(seen) + 1
            seen.append(report_at(rung, losses[rung - 1], min(losses[:rung]), 60.0 * rung))
            if side.reported(number, trial_id, seen, self.now_s):
                heapq.heappush(events, (self.now_s + self.rng.uniform(50, 100), number, trial_id, losses, seen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--pruner", default="successive_halving")
    parser.add_argument("--full-trials", type=float, help="sweep.budget.full_trials")
    parser.add_argument("--stock", action="store_true", help="stock Ray Tune's decisions instead of this project's")
    parser.add_argument("--every", type=int, default=1000, help="trials between two lines of progress")
    parser.add_argument("--folder", type=Path, help="where the sweep is written; default: a temporary folder")
    options = parser.parse_args()
    config = parse_sweep_config({
        "model": {"path": "m"}, "data": {"train": "t"}, "train": {"max_tokens": 8000, "num_reports": NUM_RUNGS}, "space": SPACE,
        "sampler": {"name": options.sampler}, "pruner": {"name": options.pruner},
        "sweep": {"num_trials": options.trials, "budget": {"full_trials": options.full_trials}},
    })  # fmt: skip
    begun = time.perf_counter()
    since: dict[str, int] = {}

    def progress(simulation: Simulation) -> None:
        if simulation.num_started % options.every == 0:
            rss = psutil.Process().memory_info().rss / 2**20
            print(
                f"{simulation.num_started:>7,} trials  {time.perf_counter() - begun:7.1f} s  resident {rss:7.1f} MiB", flush=True
            )
            print("\n".join(simulation.watch.table(since)), flush=True)
            since.update({kind: len(taken) for kind, taken in simulation.watch.taken_ms.items()})

    with tempfile.TemporaryDirectory() as scratch:
        simulation = Simulation(options.slots)
        if options.stock:
            side: Ours | Stock = Stock(options.trials, simulation.watch)
        else:
            folder = options.folder or Path(scratch)
            side = Ours(folder, config, options.slots, lambda: simulation.now_s, simulation.watch)
        simulation.run(side, progress)
        outcomes = side.outcomes()
        who = "stock OptunaSearch, ASHAScheduler" if options.stock else f"{options.sampler}, {options.pruner}"
        print(f"all {len(outcomes):,} trials, {options.slots} slots, {who}; peak "
              f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.1f} MiB resident")  # fmt: skip
        print("  " + ", ".join(f"{outcomes.count(name)} {name}" for name in sorted(set(outcomes))))
        print("\n".join(simulation.watch.table()))


def _percentile(ordered: list[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, math.ceil(q / 100 * len(ordered)) - 1)]


if __name__ == "__main__":
    main()
