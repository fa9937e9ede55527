"""Whole sweeps run under Ray: one with the real engine, others with a fake one that can fail."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sweep.plan import feasibility
from tests.support.fake_driver import main
from tests.support.fake_engine import CALIBRATED, EVALUATED_IN
from tests.support.fake_sweeps import fake_driver, results, rungs, start, sweep_folder, write_config
from tests.support.paths import ENV
from tests.support.watched_sweep import FITS, two_gpus


def test_every_fault_of_a_trial_has_its_outcome_and_the_others_go_on(watched):
    assert watched.returncode == 0, watched.err
    assert watched.err == ""
    assert "(raylet)" not in watched.out
    by_fault = {
        result["params"]["optim.weight_decay"]: result
        for result in results(sweep_folder(Path(watched.folder))).values()
        if result["params"]["lora.rank"] == FITS
    }
    expected = {0: "COMPLETE", 1: "OUT_OF_MEMORY", 2: "DIVERGED", 3: "LOST", 4: "FAILED", 5: "FAILED", 6: "COMPLETE",
                7: "OUT_OF_MEMORY"}  # fmt: skip
    assert {fault: result["outcome"] for fault, result in by_fault.items()} == expected
    assert by_fault[4]["error"] == "ZeroDivisionError: one over zero"
    assert by_fault[5]["error"] == "lora.target_modules = 'x': matches no layer"
    assert by_fault[7]["error"] == "out of memory at micro-batch 1: predicted peak 5.00 GiB, measured 6.00 GiB"
    assert by_fault[7]["peak_allocated_gib"] == 6.0
    assert "8 of 16 trials were possible" in watched.out
    (place,) = Path(watched.folder).glob(f"sweeps/*/trials/*/{EVALUATED_IN}")
    assert place.read_text() == "driver"


def test_a_sweep_with_half_its_space_infeasible_loses_no_trial(watched):
    folder = sweep_folder(Path(watched.folder))
    ended = results(folder)
    refused = {number for number, result in ended.items() if result["outcome"] == "INFEASIBLE"}
    assert len(refused) == 8 and len(ended) == 16
    for number, result in ended.items():
        launched = (folder / "trials" / f"{number:04d}" / "starts.txt").exists()
        rank = result["params"]["lora.rank"]
        corrected = result["params"]["optim.weight_decay"] == 7.0 and number not in refused  # by the worker, which measures
        assert result["predicted_peak_gib"] == (5.0 if corrected else rank)
        assert launched == (rank == FITS) != (number in refused)
        if number in refused:
            assert f"needs at least {rank}.0 GiB" in result["error"]
    assert "card       NVIDIA GeForce RTX 4090, 24.0 GiB; speed extrapolated from the data sheet" in watched.out
    assert "NVIDIA GeForce RTX 4090 is new here and gets measured" in watched.out and CALIBRATED in watched.out
    assert (folder / "card.txt").read_text().startswith("NVIDIA GeForce RTX 4090, 24.0 GiB; speed extrapolated")
    board = json.loads((folder / "leaderboard.json").read_text())
    assert board["outcomes"]["INFEASIBLE"] == len(refused) and sum(board["outcomes"].values()) == len(ended)

    resumed = fake_driver("resume", str(folder), path=watched.path)
    _, err = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, err
    assert results(folder) == ended
    assert json.loads((folder / "leaderboard.json").read_text())["outcomes"] == board["outcomes"]


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """Return a function that starts a sweep in this process, which must refuse it; it returns the line."""
    monkeypatch.setenv("FAKE_TORCH", "1")  # which the start sets, as it replaces the planner
    monkeypatch.setattr(feasibility, "make_compute_plan", feasibility.make_compute_plan)

    def _refused(**sections) -> str:
        assert main("start", str(write_config(tmp_path, **sections))) == 2
        err = capfd.readouterr().err
        assert err.count("\n") == 1, err
        return err

    return _refused


def test_a_space_in_which_nothing_fits_is_one_line_before_anything_starts(tmp_path, refused, monkeypatch):
    space = {"lora.rank": {"choices": [32, 64]}, "optim.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}
    monkeypatch.setenv("PATH", os.pathsep.join([two_gpus(tmp_path), os.environ["PATH"]]))
    err = refused(space=space)
    assert "space = 'rank=32" in err and "needs at least 32.0 GiB" in err
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_sweep_is_resumed_with_no_result_lost_or_doubled(tmp_path, number):
    space = {"lora.rank": {"choices": [2, 4, 8]}, "optim.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}
    first = {"first_trials": [{"lora.rank": 2}], "prior": True}
    process = start(tmp_path, optim={"eps": 0.2}, space=space, sweep={"num_trials": 8, **first})
    _wait_for(tmp_path, "trials/0003/reports.jsonl", process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    folder = sweep_folder(tmp_path)
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert f"python -m sweep resume={folder}" in out
        assert f"report       {folder / 'report.html'}" in out and (folder / "report.html").is_file()
    before = {trial: (result["outcome"], rungs(folder, trial)) for trial, result in results(folder).items()}

    resumed = fake_driver("resume", str(folder))
    _, err = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, err
    after = {trial: (result["outcome"], rungs(folder, trial)) for trial, result in results(folder).items()}
    assert sorted(after) == list(range(8))
    assert before.items() <= after.items()
    tried = [tuple(result["params"].values()) for _, result in sorted(results(folder).items())]
    assert tried[:4] == [(2, 0.01), (4, 0.01), (4, 0.0022), (8, 0.01)] and len(set(tried)) == 8
    for outcome, seen in after.values():
        assert seen == list(range(1, len(seen) + 1))
        assert outcome == "COMPLETE" if len(seen) == 4 else outcome == "PRUNED"
    board = json.loads((folder / "leaderboard.json").read_text())
    assert len(board["trials"]) == 8
    assert board["reevaluation"]["agrees"]


@pytest.mark.faults
def test_workers_are_reused_and_pruned_trials_stop(tmp_path):
    space = {"optim.learning_rate": {"choices": [0.001, 0.002, 0.004, 0.008, 0.016, 0.032]}}
    process = start(tmp_path, optim={"eps": 0.1}, space=space, sweep={"num_trials": 6})
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    folder = sweep_folder(tmp_path)
    processes = {file.read_text().split()[0] for file in folder.glob("trials/*/starts.txt")}
    # two slots; two trials that end at the same instant may cost one restart
    assert len(processes) <= 3
    pruned = [trial for trial, result in results(folder).items() if result["outcome"] == "PRUNED"]
    assert pruned
    assert all(len(rungs(folder, trial)) < 4 for trial in pruned)


def test_input_that_prepare_refuses_is_one_line_and_leaves_no_folder(tmp_path, refused):
    err = refused(data={"train": "missing.jsonl", "max_seq_length": 8})
    assert err == "error: data.train = 'missing.jsonl': no such file\n"
    assert not (tmp_path / "sweeps").exists()


def test_the_command_line_finds_an_adapter_with_the_real_engine(tmp_path, tiny_model_dir, tiny_data):
    arguments = [
        "model=local", f"model.path={tiny_model_dir}", "data=local", f"data.train={tiny_data}",
        "data.max_seq_length=64", "data.eval_max_seq_length=128", "data.eval_fraction=0.2", "train.max_tokens=1200",
        "train.num_reports=3", "train.tokens_per_step=128", "train.activation_checkpointing=false", "space=rank-targets-rate",
        "sweep.num_trials=4", f"sweep.output_dir={tmp_path / 'sweeps'}", "sweep.prior=true",
        "sweep.first_trials=[{lora.rank: 8}]", "cluster.num_cpu_slots=1",  # a second worker loads torch for seconds
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "sweep", *arguments], env=ENV, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    folder = sweep_folder(tmp_path)
    board = json.loads((folder / "leaderboard.json").read_text())
    assert len(board["trials"]) == 4
    first, *others = (result["params"] for _, result in sorted(results(folder).items()))
    assert first["lora.rank"] == 8 and [params["lora.rank"] for params in others] == [32, 32, 64]
    assert "\nprior      learning rate " in done.stdout and "\nfirst      4 trials: 1 of sweep.first_trials, " in done.stdout
    assert board["reevaluation"]["agrees"], board["reevaluation"]
    assert board["reevaluation"]["eval_loss"] < board["reevaluation"]["base_eval_loss"]
    gain = board["reevaluation"]["gain"]
    assert 0.0 < gain["low"] < gain["nats"] < gain["high"]
    assert board["contest"] is None or not board["contest"]["left_out"]
    assert (folder / "best" / "adapter_model.safetensors").is_file()
    examples = json.loads((folder / "examples.json").read_text())
    assert examples["trial"] == board["best_trial"] and len(examples["examples"]) == 4
    assert all(example["expected"].startswith("It is") for example in examples["examples"])
    assert "What it answers" in (folder / "best" / "README.md").read_text()
    assert "with adapter</th>" in (folder / "report.html").read_text()
    lines = [json.loads(line) for line in (folder / "trials" / "0000" / "system.jsonl").read_text().splitlines()]
    assert [line["rung"] for line in lines] == rungs(folder, 0) and all(line["process_resident_gib"] > 0.1 for line in lines)
    assert "base model" in done.stdout and "best adapter" in done.stdout and "gain         " in done.stdout
    with sqlite3.connect(tmp_path / "sweeps" / "mlflow.db") as database:
        statuses = [row[0] for row in database.execute("select status from runs")]
        outcomes = [row[0] for row in database.execute("select value from tags where key = 'outcome'")]
        lows = database.execute("select value from latest_metrics where key = 'eval/gain_low_nats_per_token'")
        assert [row[0] for row in lows] == [gain["low"]]
        tags = {row[0] for row in database.execute("select key from tags")}
        versions = list(database.execute("select name, version, description from model_versions"))
    assert len(statuses) == 5 and set(statuses) <= {"FINISHED", "KILLED", "SCHEDULED"}  # the last: paused
    assert sorted(outcomes) == sorted(trial["outcome"] for trial in board["trials"])
    assert {"version.torch", "sweep.folder"} <= tags
    ((name, version, text),) = versions
    assert (name, version) == ("sweep", 1) and str(tiny_model_dir) in text


def _wait_for(tmp_path: Path, pattern: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not list((tmp_path / "sweeps").glob(f"*/{pattern}")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
