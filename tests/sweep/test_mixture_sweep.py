"""A whole sweep over rank and targets of a tiny mixture, from the command line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from engine.adapter.portable import read_adapter
from engine.command_answers import PreparedFacts
from sweep import preflight
from sweep.__main__ import main
from tests.support.fake_sweeps import results, sweep_folder
from tests.support.paths import ENV

GRID = {(rank, targets) for rank in (1, 4) for targets in ("attention", "experts", "both")}


def arguments(place, model, data):
    return [
        "model=local", f"model.path={model}", "data=local", f"data.train={data}",
        "data.max_seq_length=64", "data.eval_max_seq_length=128", "data.eval_fraction=0.2", "train.max_tokens=512",
        "train.num_reports=1", "train.tokens_per_step=128", "train.activation_checkpointing=false", "space=rank-experts",
        "space.lora.rank={choices: [1, 4]}", "~space.optim", "optim.learning_rate=1e-2", "sampler=grid",
        "pruner=none", "tracking=none", "sweep.num_examples=0", f"sweep.output_dir={place / 'sweeps'}",
        "cluster.num_cpu_slots=1",  # a second worker loads torch for seconds
    ]  # fmt: skip


def test_a_dry_run_says_what_of_a_mixture_is_trained_and_writes_nothing(
    tmp_path, tiny_mixture_dir, tiny_data, monkeypatch, capsys
):
    """In one process, because three would load libraries for seconds. The engine's answer is what it writes."""
    from engine.prepare import prepare

    def prepare_here(configs, module):
        return PreparedFacts.from_dict(json.loads(json.dumps(prepare(configs).to_dict())))

    monkeypatch.setattr(preflight, "prepare", prepare_here)
    assert main([*arguments(tmp_path, tiny_mixture_dir, tiny_data), "dry_run=true"]) == 0
    said = capsys.readouterr().out
    assert "of the weights are experts, in NF4: lora.target_modules=[all-linear,experts] adapts them too" in said
    assert all(words in said for words in ("attention", "experts", "both")), said
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.faults  # half a minute of processor
def test_a_sweep_over_rank_and_place_of_adapters_finds_one_for_a_mixture(tmp_path, tiny_mixture_dir, tiny_data):
    words = [sys.executable, "-m", "sweep", *arguments(tmp_path, tiny_mixture_dir, tiny_data)]
    done = subprocess.run(words, env=ENV, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    folder = sweep_folder(tmp_path)
    ended = results(folder)
    points = {(result["params"]["lora.rank"], result["params"]["lora.target_modules"]) for result in ended.values()}
    assert points == GRID and all(result["outcome"] == "COMPLETE" for result in ended.values())
    board = json.loads((folder / "leaderboard.json").read_text())
    losses = {trial["eval_loss"] for trial in board["trials"]}
    assert len(losses) == len(GRID)  # each place and rank learns something else
    assert board["reevaluation"]["agrees"], board["reevaluation"]
    assert board["reevaluation"]["eval_loss"] < board["reevaluation"]["base_eval_loss"]
    best = ended[board["best_trial"]]["params"]["lora.target_modules"]
    assert bool(read_adapter(folder / "best").experts) == (best != "attention")
