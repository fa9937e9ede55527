"""A whole sweep of the committed forgetting experiment, on a tiny model, keeps to its limits and mixes its data."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys

import pytest

from tests.support.fake_sweeps import sweep_folder
from tests.support.paths import ENV


@pytest.mark.timeout(600)  # a driver starts Ray and the engine
@pytest.mark.faults
def test_a_sweep_chooses_within_its_limits_and_every_place_shows_each_set(tmp_path, tiny_model_dir):
    words = [
        "+experiment=forgetting", "model=local", f"model.path={tiny_model_dir}", "data.eval_max_seq_length=512",
        "data.eval_max_samples=8", "train.max_tokens=8000", "train.report_at_tokens=[4000,8000]", "train.tokens_per_step=512",
        "space.optim.learning_rate.low=5.0e-3", "space.optim.learning_rate.high=2.0e-2", "cluster.num_cpu_slots=1",
        "data.eval_limits={docs: {above_base: 0.5}}", "sweep.num_trials=2", "sweep.num_examples=1",
        f"sweep.output_dir={tmp_path / 'sweeps'}",
    ]  # fmt: skip

    def sweep(*words):
        return subprocess.run([sys.executable, "-m", "sweep", *words], env=ENV, capture_output=True, text=True, cwd=tmp_path)

    done = sweep(*words)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "evaluation eval_loss is of orders; docs reported; docs at most 0.5 nats above the base model" in done.stdout
    assert "data: mixture of 8,000 tokens a trial" in done.stdout and "data.train.0 80.0% of the tokens" in done.stdout
    folder = sweep_folder(tmp_path)
    board = json.loads((folder / "leaderboard.json").read_text())
    ranked = {trial["number"]: trial for trial in board["trials"] if trial["rank"]}
    best, again = ranked[board["best_trial"]], board["reevaluation"]
    assert best["eval_losses"]["orders"] == best["eval_loss"] and best["above_limits"] <= 0.0
    assert best["above_limits"] == pytest.approx(best["eval_losses"]["docs"] - again["base_eval_losses"]["docs"] - 0.5, abs=1e-3)
    assert again["agrees"] and again["eval_losses"] == pytest.approx(best["eval_losses"], rel=1e-3)
    assert again["base_eval_losses"]["orders"] == again["base_eval_loss"]
    assert "| with this adapter on docs |" in (folder / "best" / "README.md").read_text()
    assert "above limits" in (folder / "report.html").read_text() and "nats per target token" in done.stdout
    with sqlite3.connect(tmp_path / "sweeps" / "mlflow.db") as database:
        keys = {row[0] for row in database.execute("select distinct key from latest_metrics")}
    losses = {f"eval/{kind}loss/{name}" for name in ("docs", "orders") for kind in ("", "base_")}
    assert {*losses, "eval/above_limits_nats", "data/evaluation/docs/rows_used", "data/training/0/tokens"} <= keys

    changed = sweep(f"resume={folder}", "data.eval_weights={docs: 1}")
    assert changed.returncode == 2 and "data.eval_weights" in changed.stderr and "cannot be changed on resume" in changed.stderr
