"""Run the makespan's trials through other libraries: a process per trial, under Optuna with ASHA.

The study has Optuna's own SuccessiveHalvingPruner with our factor. The driver waits for each
trial, as one card needs. No torch.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna

from engine.bench.process import ENVIRONMENT, ERROR_LINE, ROOT
from tests.bench.makespan_job import Job, modules

CHILD = ROOT / "tests" / "bench" / "makespan_peer_trial.py"
POLL_S = 0.02
ENDED = "ended.json"
ENDS = ("COMPLETE", "PRUNED", "DIVERGED")
NOTES = ("settings_left_out", "tokens_counted")


@dataclass
class Peers:
    """Hold what every trial of a system needs.

    where: the folder in which the trials' processes run and keep their caches. Trials that ended
    there are not run again, so that a row can be measured in parts. path: a folder of packages that
    comes first for these processes alone. timeout_s: for each trial. on_card: False on a machine
    without one. child: the program of a trial.
    """

    system: str
    job: Job
    model: Path
    samples: tuple[Path, Path]
    where: Path
    path: Path | None
    timeout_s: float
    on_card: bool
    child: Path = CHILD

    def run(self, budget_s: float | None) -> dict[str, Any]:
        """Return what the trials took together, or `error` if the first one fails.

        budget_s: no trial starts after it. The running one ends at its next rung, and the next part runs it again.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2, min_early_stopping_rate=0)
        study = optuna.create_study(direction="minimize", pruner=pruner)
        began_s, earlier_s, cut_s = time.monotonic(), 0.0, 0.0
        deadline, ended = None if budget_s is None else began_s + budget_s, []
        for number, point in enumerate(self.job.points()):
            kept = self.where / f"{number:04d}" / ENDED
            if kept.is_file():
                ended.append(json.loads(kept.read_text()))
                earlier_s += ended[-1]["wall_s"]
                _enter(study, ended[-1])
                continue
            if deadline is not None and time.monotonic() >= deadline:
                break
            started_s = time.monotonic()
            found = self._trial(study, number, point, deadline)
            found["wall_s"] = time.monotonic() - started_s
            if found["outcome"] == "STOPPED":
                cut_s = found["wall_s"]
                break
            ended.append(found)
            if number == 0 and "error" in found:
                break
            kept.write_text(json.dumps(found))
        return {"wall_s": time.monotonic() - began_s + earlier_s - cut_s, "cut_s": cut_s, **self._sums(ended)}

    def _sums(self, ended: list[dict[str, Any]]) -> dict[str, Any]:
        outcomes = [trial["outcome"] for trial in ended]
        losses = [loss for trial in ended for loss in trial["losses"] if math.isfinite(loss)]
        failed = [trial["error"] for trial in ended if "error" in trial]
        peaks = [trial["peak_gib"] for trial in ended if trial["peak_gib"] is not None]
        whole = {
            "trials_done": sum(outcome in ENDS for outcome in outcomes),
            "outcomes": {name: outcomes.count(name) for name in sorted(set(outcomes))},
            "tokens": sum(trial["tokens"] for trial in ended),
            "gpu_s": sum(trial["seconds"] for trial in ended),
            "best_eval_loss": min(losses, default=None),
            "peak_gib": max(peaks, default=None),
            **{f"version.{name}": version for trial in ended for name, version in trial["versions"].items()},
            **{name: value for trial in ended for name, value in trial["notes"].items()},
        }
        if failed and "error" in ended[0]:
            return {**whole, "error": failed[0]}
        return {**whole, **({"first_failure": failed[0]} if failed else {})}

    def _trial(self, study: optuna.Study, number: int, point: dict[str, Any], deadline: float | None) -> dict[str, Any]:
        """Run one trial in a process of its own; return its outcome, tokens, seconds and losses."""
        trial, folder = study.ask(), self.where / f"{number:04d}"
        shutil.rmtree(folder, ignore_errors=True)  # of a trial that did not end
        folder.mkdir(parents=True)
        began_s, outcome = time.monotonic(), "FAILED"
        reports: list[dict[str, Any]] = []
        with (folder / "log").open("w") as log:
            process = self._start(folder, point, log)
            try:
                for line in _lines(folder / "reports", process, began_s + self.timeout_s):
                    reports.append(line)
                    if "eval_loss" in line:
                        outcome = self._verdict(trial, line, deadline)
                        with suppress(BrokenPipeError):  # it has died, which its exit code tells
                            process.stdin.write(b"go\n" if outcome == "RUNNING" else b"stop\n")
                            process.stdin.flush()
                code = process.poll()
            finally:
                _kill(process)
        found = _of(reports, time.monotonic() - began_s)
        if code == 0 and any("ended" in line for line in reports):
            _tell(study, trial, outcome, found["losses"])
            return {**found, "outcome": outcome}
        _tell(study, trial, "FAILED", [])
        reason = f"timed out after {self.timeout_s:g} s" if code is None else _reason((folder / "log").read_text(), code)
        return {**found, "outcome": "FAILED", "error": reason}

    def _verdict(self, trial: optuna.Trial, line: dict[str, Any], deadline: float | None) -> str:
        if not math.isfinite(line["eval_loss"]):
            return "DIVERGED"
        trial.report(line["eval_loss"], line["rung"])
        if line["rung"] >= len(self.job.report_at):
            return "COMPLETE"
        if trial.should_prune():
            return "PRUNED"
        return "STOPPED" if deadline is not None and time.monotonic() >= deadline else "RUNNING"

    def _start(self, folder: Path, point: dict[str, Any], log: Any) -> subprocess.Popen:
        task = {
            **asdict(self.job), "system": self.system, "model": str(self.model), "train": str(self.samples[0]),
            "held_out": str(self.samples[1]), "folder": str(folder), "adapter": str(folder / "adapter"),
            "reports": str(folder / "reports"), "cache": str(self.where / "datasets"), "on_card": self.on_card,
            "rank": point["lora.rank"], "modules": modules(point["lora.target_modules"]),
            "learning_rate": point["optim.learning_rate"],
        }  # fmt: skip
        (folder / "task.json").write_text(json.dumps(task))
        given = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
        path = os.pathsep.join([*([str(self.path)] if self.path else []), *given])
        caches = {name: str(self.where / name.lower()) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        return subprocess.Popen(
            [sys.executable, str(self.child), str(folder / "task.json")],
            stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=self.where, start_new_session=True,
            env={**os.environ, **ENVIRONMENT, **caches, "PYTHONPATH": path},
        )  # fmt: skip


def _enter(study: optuna.Study, ended: dict[str, Any]) -> None:
    """Enter a trial of an earlier part, so that the pruner judges later ones as if it had just ended."""
    trial = study.ask()
    for rung, loss in zip(ended["rungs"], ended["losses"]):
        if math.isfinite(loss):
            trial.report(loss, rung)
        trial.should_prune()  # notes the level that the trial has reached
    _tell(study, trial, ended["outcome"], ended["losses"])


def _tell(study: optuna.Study, trial: optuna.Trial, outcome: str, losses: list[float]) -> None:
    states = {"COMPLETE": optuna.trial.TrialState.COMPLETE, "FAILED": optuna.trial.TrialState.FAIL}
    state = states.get(outcome, optuna.trial.TrialState.PRUNED)
    study.tell(trial, losses[-1] if outcome == "COMPLETE" else None, state=state)


def _of(reports: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    rungs = [line for line in reports if "eval_loss" in line]
    return {
        "tokens": rungs[-1]["tokens"] if rungs else 0,
        "rungs": [line["rung"] for line in rungs],
        "losses": [line["eval_loss"] for line in rungs],
        "seconds": seconds,
        "peak_gib": next((line["peak_gib"] for line in reports if "ended" in line), None),
        "notes": {name: line[name] for line in reports for name in NOTES if line.get(name)},
        "versions": next((line["versions"] for line in reports if "versions" in line), {}),
    }


def _lines(file: Path, process: subprocess.Popen, until_s: float) -> Any:
    """Yield the lines of JSON that the process writes, until it ends or the time is over."""
    taken = 0
    while True:
        ended = process.poll() is not None  # before reading, so that no last line is missed
        text = file.read_text() if file.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        for line in lines[taken:]:
            yield json.loads(line)
        taken = len(lines)
        if ended or time.monotonic() >= until_s:
            return
        time.sleep(POLL_S)


def _kill(process: subprocess.Popen) -> None:
    """End the process with the compilers that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with suppress(BrokenPipeError):
        process.stdin.close()


def _reason(log: str, code: int) -> str:
    if "OutOfMemoryError" in log:
        return "out of memory"
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR_LINE.match(line)]
    return (errors or lines or [f"exit code {code}"])[-1][:300] if code else "ended without its last rung"
