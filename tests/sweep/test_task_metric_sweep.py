"""A whole sweep of the committed extraction experiment, on a tiny model, chooses by a function of the user."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys

import pytest

from tests.support.fake_sweeps import sweep_folder
from tests.support.paths import ENV

OWN = """
def length(prompt: str, reference: str, answer: str, sample: dict) -> float:
    assert sample["customer"] in prompt and str(sample["quantity"]) in reference
    return float(len(answer))
"""


@pytest.mark.timeout(600)  # three drivers start Ray or the engine, one after the other
@pytest.mark.faults
def test_a_sweep_chooses_by_the_users_function_and_every_place_shows_it(tmp_path, tiny_model_dir):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "scores_of_a_user.py").write_text(OWN)
    env = {**ENV, "PYTHONPATH": f"{ENV.get('PYTHONPATH', '')}:{tmp_path / 'code'}".lstrip(":")}
    arguments = [
        "+experiment=extraction", "model=local", f"model.path={tiny_model_dir}", "data.max_seq_length=256",
        "data.eval_max_seq_length=512", "data.eval_max_samples=8", "train.max_tokens=16_000",
        "train.report_at_tokens=[8000,16000]", "train.tokens_per_step=512",
        "space.optim.learning_rate.low=5.0e-3",
        "space.optim.learning_rate.high=2.0e-2", "cluster.num_cpu_slots=1", "metrics.max_new_tokens=8", "metrics.max_samples=6",
        "metrics.at=every", 'metrics.length={function: "scores_of_a_user:length", direction: minimize}',
        "sweep.objectives=[length]", "sweep.num_trials=2", f"sweep.output_dir={tmp_path / 'sweeps'}",
    ]  # fmt: skip

    def sweep(*words):
        return subprocess.run([sys.executable, "-m", "sweep", *words], env=env, capture_output=True, text=True, cwd=tmp_path)

    wrong = sweep(*arguments[:-2], "sweep.num_trials=2", "metrics.length=scores_of_a_user:lenght")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1) and "metrics.length" in wrong.stderr, wrong.stderr
    assert not (tmp_path / "sweeps").exists()

    done = sweep(*arguments)
    assert done.returncode == 0, done.stderr + done.stdout
    folder = sweep_folder(tmp_path)
    board = json.loads((folder / "leaderboard.json").read_text())
    scores = {trial["number"]: trial["metrics"]["length"] for trial in board["trials"] if trial["rank"]}
    assert len(scores) == 2 and max(scores.values()) > 0.0 and board["objectives"] == ["length"]
    assert scores[board["best_trial"]] <= min(scores.values()) + 0.005 and "lowest length" in board["rule"]
    again = board["reevaluation"]
    assert again["agrees"] and again["metrics"]["length"] == scores[board["best_trial"]]
    assert set(again["base_metrics"]) == {"exact_match", "number_match", "json_valid", "length"}
    card = (folder / "best" / "README.md").read_text()
    assert "| task metric | base model | with this adapter |" in card and "--run-own-metrics" in card
    report = (folder / "report.html").read_text()
    assert "Answers of the best trials" in report and "[length " in report
    assert "length" in done.stdout and "best adapter" in done.stdout
    with sqlite3.connect(tmp_path / "sweeps" / "mlflow.db") as database:
        keys = {row[0] for row in database.execute("select distinct key from latest_metrics")}
    assert {"eval/length", "eval/exact_match", "eval/base_length", "time/metrics_s"} <= keys

    unpermitted = sweep(f"resume={folder}", "dry_run=true")
    assert unpermitted.returncode == 2 and "add metrics.length=scores_of_a_user:length" in unpermitted.stderr
    permitted = sweep(f"resume={folder}", "metrics.length=scores_of_a_user:length", "dry_run=true")
    assert permitted.returncode == 0, permitted.stderr
    assert "answers    6 samples, answers of up to 8 tokens, 2 of 2 rungs" in permitted.stdout
