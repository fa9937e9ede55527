"""Run sweeps with the fake engine as processes to be killed, and check their folders afterwards."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.trial_report import TrialReport

from .nodes import ENV

CURVES = str(Path(__file__).with_name("curves.json"))
SPACE = {"lora.rank": {"choices": [2, 4, 8, 16]}, "optim.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}
NUM_RUNGS = 4
MOST_SLOTS = 2  # of the sweeps with a budget of tokens
GOING_ON = ("PAUSED", "STOPPED")  # outcomes of trials that a larger budget continues: the journal has no end of them


def config(output: Path, **sections: Any) -> dict[str, Any]:
    """Return a sweep over the recorded curves: 10 trials of 4 rungs, 10 ms a rung."""
    whole = {
        "model": {"path": "m"},
        "data": {"train": CURVES, "max_seq_length": 8},
        "train": {"max_tokens": 400, "num_reports": NUM_RUNGS},
        "optim": {"eps": 0.01},
        "space": SPACE,
        "sweep": {"num_trials": 10, "output_dir": str(output)},
        "cluster": {"num_cpu_slots": 2},
        "tracking": {"name": "mlflow"},
    }
    for name, section in sections.items():
        whole[name] = {**whole[name], **section} if name in ("sweep", "optim", "train", "cluster") else section
    return whole


class Driver:
    """A driver process that prints to a file, so that it never waits for a reader."""

    def __init__(self, log: Path, *arguments: str, cwd: Path | None = None) -> None:
        self.log = log
        command = [sys.executable, "-m", "tests.support.fake_driver", *arguments]
        with open(log, "w") as out:
            self.process = subprocess.Popen(command, env=ENV, stdout=out, stderr=subprocess.STDOUT, cwd=cwd)
        self.started_s = time.monotonic()

    @classmethod
    def start(cls, config: dict[str, Any], where: Path) -> Driver:
        where.mkdir(parents=True, exist_ok=True)
        file = where / "config.json"
        file.write_text(json.dumps(config))
        return cls(where / "start.log", "start", str(file))

    @classmethod
    def resume(cls, folder: Path) -> Driver:
        number = len(list(folder.parent.parent.glob("resume-*.log")))
        return cls(folder.parent.parent / f"resume-{number}.log", "resume", str(folder))

    def text(self) -> str:
        return self.log.read_text()

    def wait(self, timeout_s: float = 200.0) -> int:
        return self.process.wait(timeout_s)

    def wait_for(self, text: str, timeout_s: float = 120.0) -> bool:
        """Wait until the driver has printed `text`; return False if it ended before."""
        deadline = time.monotonic() + timeout_s
        while text not in self.text():
            if self.process.poll() is not None:
                return text in self.text()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{text!r} is not in {self.text()}")
            time.sleep(0.01)
        return True

    def kill(self, number: signal.Signals = signal.SIGKILL) -> bool:
        """Kill the driver; return whether it was still alive."""
        if self.process.poll() is not None:
            return False
        os.kill(self.process.pid, number)
        self.process.wait(60)
        return True


def only_folder(output: Path) -> Path | None:
    """Return the sweep folder in it, or None if there is no complete one."""
    folders = [file.parent for file in output.glob("*/sweep_config.json")]
    assert len(folders) < 2, folders
    return folders[0] if folders else None


@dataclass(frozen=True)
class Sweep:
    """A sweep's results: params, outcome and curve by trial number, and the best trial."""

    trials: dict[int, tuple[dict[str, Any], str, list[float]]]
    best: int | None
    faults: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Sweep:
        """Check that no result is lost, doubled or torn in journal, files and MLflow.

        `faults` lists what is wrong.
        """
        faults: list[str] = []
        try:
            results = {int(file.parent.name): json.loads(file.read_text()) for file in folder.glob("trials/*/result.json")}
            curves = {number: _reports(folder, number) for number in results}
            board = json.loads((folder / "leaderboard.json").read_text())
            journal = _Journal(folder)
        except (OSError, ValueError) as error:
            return cls({}, None, [f"torn: {error}"])
        trials = {
            number: (results[number]["params"], results[number]["outcome"], [r["eval_loss"] for r in curves[number]])
            for number in sorted(results)
        }
        wanted = json.loads((folder / "sweep_config.json").read_text())
        faults += _faults_of_trials(trials, curves, journal, wanted)
        if sorted(row["number"] for row in board["trials"]) != sorted(trials):
            faults.append("the leaderboard has other trials than the folder")
        if board["best_trial"] is not None and not board["reevaluation"]["agrees"]:
            faults.append("the best adapter does not agree with its report")
        if wanted["tracking"]["name"] == "mlflow" and wanted["tracking"]["uri"] is None:
            faults += _faults_of_mlflow(folder, trials)
        return cls(trials, board["best_trial"], faults)


def _reports(folder: Path, number: int) -> list[dict[str, Any]]:
    file = folder / "trials" / f"{number:04d}" / "reports.jsonl"
    reports = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    assert all(set(report) == set(TrialReport.__dataclass_fields__) for report in reports)
    return reports


class _Journal:
    """Reads Optuna's journal line by line without Optuna.

    Counts how often each trial was made, reported a rung, and ended.
    """

    def __init__(self, folder: Path) -> None:
        lines = [json.loads(line) for line in (folder / "study.journal").read_text().splitlines()]
        created = [line for line in lines if line["op_code"] == 4]  # CREATE_TRIAL
        self.num_trials = len(created)
        self.values: dict[tuple[int, int], list[float]] = {}
        self.ends: Counter[int] = Counter(n for n, line in enumerate(created) if line.get("state") not in (None, 0))
        for line in lines:
            if line["op_code"] == 7:  # SET_TRIAL_INTERMEDIATE_VALUE
                self.values.setdefault((line["trial_id"], line["step"]), []).append(line["intermediate_value"])
            # SET_TRIAL_STATE_VALUES; neither running nor waiting
            elif line["op_code"] == 6 and line["state"] not in (0, 4):
                self.ends[line["trial_id"]] += 1


def _faults_of_trials(trials: dict, curves: dict, journal: _Journal, wanted: dict) -> list[str]:
    """wanted: the sweep's config. With a budget of tokens a sweep starts as many trials as it likes, and spends it."""
    faults, num_wanted, full_trials = [], wanted["sweep"]["num_trials"], wanted["sweep"]["budget"]["full_trials"]
    num_started = sum(outcome != "INFEASIBLE" for _, outcome, _ in trials.values())
    if full_trials is not None:
        num_wanted, num_rungs = num_started, sum(map(len, curves.values()))
        if not full_trials * NUM_RUNGS <= num_rungs < full_trials * NUM_RUNGS + MOST_SLOTS:
            faults.append(f"{num_rungs} rungs for the tokens of {full_trials} full trials")
    if num_started != num_wanted or sorted(trials) != list(range(journal.num_trials)):
        faults.append(f"{len(trials)} results for {num_wanted} trials wanted and {journal.num_trials} in the journal")
    for number, (_, outcome, losses) in trials.items():
        rungs = [report["rung"] for report in curves[number]]
        if rungs != list(range(1, len(rungs) + 1)):
            faults.append(f"trial {number}: rungs {rungs}")
        heard = {rung: values for (trial, rung), values in journal.values.items() if trial == number}
        if heard != {rung: [loss] for rung, loss in zip(rungs, losses)}:
            faults.append(f"trial {number}: {heard} in the journal, {losses} in its folder")
        if journal.ends[number] != (outcome not in GOING_ON):
            faults.append(f"trial {number}: ended {journal.ends[number]} times")
        if (outcome == "COMPLETE") != (len(rungs) == NUM_RUNGS):
            faults.append(f"trial {number}: {outcome} with {len(rungs)} rungs")
    if len({json.dumps(params, sort_keys=True) for params, _, _ in trials.values()}) != len(trials):
        faults.append("a config was trained twice")
    return faults


def _faults_of_mlflow(folder: Path, trials: dict) -> list[str]:
    """Expect one parent run, one child run a trial with its outcome, and one point a rung."""
    faults = []
    with sqlite3.connect(folder.parent / "mlflow.db") as database:
        ours = "select run_uuid from tags where key = 'sweep.folder' and value = ?"
        parents = [row[0] for row in database.execute(ours, [str(folder)])]
        if len(parents) != 1:
            return [f"mlflow: {len(parents)} parent runs"]
        children = [row[0] for row in database.execute(
            "select run_uuid from tags where key = 'mlflow.parentRunId' and value = ?", parents)]  # fmt: skip
        tags = {run: dict(database.execute("select key, value from tags where run_uuid = ?", [run])) for run in children}
        if sorted(int(tag["sweep.trial_number"]) for tag in tags.values()) != sorted(trials):
            return ["mlflow: other trials than in the folder"]
        for run, tag in tags.items():
            number = int(tag["sweep.trial_number"])
            curve = "select value from metrics where run_uuid = ? and key = 'eval/loss_nats_per_token' order by step"
            points = [row[0] for row in database.execute(curve, [run])]
            if points != trials[number][2] or tag["outcome"] != trials[number][1]:
                faults.append(f"mlflow: trial {number}: {tag['outcome']} {points}")
    return faults
