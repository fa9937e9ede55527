"""Run the makespan's trials through other libraries: a process per trial, under Optuna with ASHA.

The study has Optuna's own SuccessiveHalvingPruner with our factor. The driver waits for each
trial, or keeps several of them on the card, as `optimize(n_jobs=N)` would. No torch.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import optuna

from engine.bench.process import ENVIRONMENT, ERROR_LINE, ROOT
from tests.bench.makespan.job import Job, modules

CHILD = ROOT / "tests" / "bench" / "makespan" / "peer_trial.py"
POLL_S = 0.02
ENDED = "ended.json"
ENDS = ("COMPLETE", "PRUNED", "DIVERGED")
NOTES = ("settings_left_out", "tokens_counted")
CONTEXT_GIB = 0.6
"""Device memory of a process outside torch's allocator, which a cap does not count: context and kernels."""


@dataclass
class Peers:
    """Hold what every trial of a system needs.

    where: the folder in which the trials' processes run and keep their caches. Trials that ended
    there are not run again, so that a row can be measured in parts. path: a folder of packages that
    comes first for these processes alone. timeout_s: for each trial. on_card: False on a machine
    without one. child: the program of a trial. at_once: processes that share the card, its memory
    and the processor's cores in equal parts.
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
    at_once: int = 1
    _halt: threading.Event = field(default_factory=threading.Event)

    def run(self, budget_s: float | None) -> dict[str, Any]:
        """Return what the trials took together, or `error` if the first one fails.

        budget_s: no trial starts after it. Running ones end at their next rung, and the next part runs them
        again. The row's clock stops at the end of the last trial that ended, and the next part lets it go on.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2, min_early_stopping_rate=0)
        study = optuna.create_study(direction="minimize", pruner=pruner)
        now_s, ended = time.monotonic(), self._kept(study)
        began_s = now_s - max((trial["row_s"] for trial in ended.values()), default=0.0)
        deadline = None if budget_s is None else now_s + budget_s
        waiting = iter([pair for pair in enumerate(self.job.points()) if pair[0] not in ended])
        turn, cut = threading.Lock(), []

        def work(slot: int) -> None:
            while not self._halt.is_set() and (deadline is None or time.monotonic() < deadline):
                with turn:
                    number, point = next(waiting, (None, None))
                if number is None:
                    return
                found = self._trial(study, number, point, slot, deadline)
                found["row_s"] = time.monotonic() - began_s
                if found["outcome"] == "STOPPED" or self._halt.is_set():
                    cut.append(number)
                    return
                ended[number] = found
                if number == 0 and "error" in found:
                    self._halt.set()
                else:
                    (self.where / f"{number:04d}" / ENDED).write_text(json.dumps(found))

        self._share(work)
        wall_s = max((trial["row_s"] for trial in ended.values()), default=0.0)
        lost_s = time.monotonic() - began_s - wall_s if cut else 0.0
        return {"wall_s": wall_s, "cut_s": lost_s, **self._sums([ended[number] for number in sorted(ended)])}

    def _share(self, work: Any) -> None:
        """Let the slots work, each in a thread. If one fails or the user interrupts, the others' processes end too."""
        self._halt.clear()
        with ThreadPoolExecutor(self.at_once) as pool:
            try:
                slots = [pool.submit(work, slot) for slot in range(self.at_once)]
                for done in wait(slots, return_when=FIRST_EXCEPTION).done:
                    done.result()
            except BaseException:
                self._halt.set()
                raise

    def _kept(self, study: optuna.Study) -> dict[int, dict[str, Any]]:
        """Return the trials of earlier parts by their numbers, and enter them into the study in the order of their ends."""
        files = [(number, self.where / f"{number:04d}" / ENDED) for number in range(self.job.trials)]
        found = {number: json.loads(file.read_text()) for number, file in files if file.is_file()}
        for trial in sorted(found.values(), key=lambda trial: trial["row_s"]):
            _enter(study, trial)
        return found

    def _sums(self, ended: list[dict[str, Any]]) -> dict[str, Any]:
        outcomes = [trial["outcome"] for trial in ended]
        losses = [loss for trial in ended for loss in trial["losses"] if math.isfinite(loss)]
        failed = [trial["error"] for trial in ended if "error" in trial]
        peaks = [trial["peak_gib"] for trial in ended if trial["peak_gib"] is not None]
        whole = {
            "trials_done": sum(outcome in ENDS for outcome in outcomes),
            "outcomes": {name: outcomes.count(name) for name in sorted(set(outcomes))},
            "tokens": sum(trial["tokens"] for trial in ended),
            "gpu_s": _covered_s([(trial["row_s"] - trial["seconds"], trial["row_s"]) for trial in ended]),
            "best_eval_loss": min(losses, default=None),
            "peak_gib": max(peaks, default=None),  # of one process
            **{f"version.{name}": version for trial in ended for name, version in trial["versions"].items()},
            **{name: value for trial in ended for name, value in trial["notes"].items()},
        }
        if failed and "error" in ended[0]:
            return {**whole, "error": failed[0]}
        return {**whole, **({"first_failure": failed[0]} if failed else {})}

    def _trial(
        self, study: optuna.Study, number: int, point: dict[str, Any], slot: int, deadline: float | None
    ) -> dict[str, Any]:
        """Run one trial in a process of its own; return its outcome, tokens, seconds and losses."""
        trial, folder = study.ask(), self.where / f"{number:04d}"
        shutil.rmtree(folder, ignore_errors=True)  # of a trial that did not end
        folder.mkdir(parents=True)
        began_s, outcome = time.monotonic(), "FAILED"
        reports: list[dict[str, Any]] = []
        with (folder / "log").open("w") as log:
            process = self._start(folder, point, slot, log)
            try:
                for line in _lines(folder / "reports", process, began_s + self.timeout_s, self._halt):
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

    def _start(self, folder: Path, point: dict[str, Any], slot: int, log: Any) -> subprocess.Popen:
        task = {
            **asdict(self.job), "cap_gib": share_gib(self.job.cap_gib, self.at_once), "system": self.system,
            "model": str(self.model), "train": str(self.samples[0]), "held_out": str(self.samples[1]),
            "folder": str(folder), "adapter": str(folder / "adapter"), "reports": str(folder / "reports"),
            "cache": str(self.where / "datasets"), "on_card": self.on_card,
            "rank": point["lora.rank"], "modules": modules(point["lora.target_modules"]),
            "learning_rate": point["optim.learning_rate"],
        }  # fmt: skip
        (folder / "task.json").write_text(json.dumps(task))
        given = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
        path = os.pathsep.join([*([str(self.path)] if self.path else []), *given])
        caches = {name: str(self.where / name.lower()) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        # Unsloth writes modules into its working folder, so processes that run at once have one each.
        place = self.where / f"slot{slot}" if self.at_once > 1 else self.where
        place.mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, str(self.child), str(folder / "task.json")],
            stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=place, start_new_session=True,
            env={**_threads(self.at_once), **os.environ, **ENVIRONMENT, **caches, "PYTHONPATH": path},
        )  # fmt: skip


def share_gib(cap_gib: float | None, at_once: int) -> float | None:
    """Return the cap of each process, so that all of them with their contexts fit the cap. Raises ValueError."""
    if cap_gib is None or at_once == 1:
        return cap_gib
    share = cap_gib / at_once - CONTEXT_GIB
    if share <= 0.0:
        raise ValueError(f"--peers-at-once {at_once}: {cap_gib:g} GiB do not hold the contexts of so many processes")
    return share


def _threads(at_once: int) -> dict[str, str]:
    """Return the variables that give each process its part of the cores, which the user's own override."""
    part = str(max(1, len(os.sched_getaffinity(0)) // at_once))
    return {} if at_once == 1 else {"OMP_NUM_THREADS": part, "TORCHINDUCTOR_COMPILE_THREADS": part}


def _covered_s(spans: list[tuple[float, float]]) -> float:
    """Return the seconds in which at least one of the spans lay."""
    covered_s, until_s = 0.0, 0.0
    for start_s, end_s in sorted(spans):
        covered_s += max(0.0, end_s - max(start_s, until_s))
        until_s = max(until_s, end_s)
    return covered_s


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


def _lines(file: Path, process: subprocess.Popen, until_s: float, halt: threading.Event) -> Any:
    """Yield the lines of JSON that the process writes, until it ends, the time is over or all are to halt."""
    taken = 0
    while True:
        ended = process.poll() is not None  # before reading, so that no last line is missed
        text = file.read_text() if file.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        for line in lines[taken:]:
            yield json.loads(line)
        taken = len(lines)
        if ended or halt.is_set() or time.monotonic() >= until_s:
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
