"""A sweep whose data change while it runs stops in one line, and goes on with the former data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.paths import ENV

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]


def sweep(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "sweep", *arguments], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def losses(folder: Path) -> dict[str, list[float]]:
    files = sorted(folder.glob("trials/*/reports.jsonl"))
    return {file.parent.name: [json.loads(line)["eval_loss"] for line in file.read_text().splitlines()] for file in files}


def test_lines_appended_in_the_middle_of_a_sweep_stop_it_and_are_in_no_score(tmp_path, tiny_model_dir, tiny_data):
    data = tmp_path / "data.jsonl"
    shutil.copy(tiny_data, data)
    given = [
        f"model.path={tiny_model_dir}", f"data.train={data}", "data.max_seq_length=128", "data.eval_max_seq_length=128",
        "data.eval_fraction=0.2", "train.max_tokens=1536", "train.num_reports=3", "train.tokens_per_step=256",
        "train.device=cpu", "sampler=random", "pruner=none", "tracking=none", "sweep.num_trials=3", "sweep.num_examples=0",
        "cluster.num_cpu_slots=1",
    ]  # fmt: skip
    process = sweep(*given, f"sweep.output_dir={tmp_path / 'sweeps'}")
    while not list(tmp_path.glob("sweeps/*/trials/0000/reports.jsonl")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    (folder,) = (path.parent for path in tmp_path.glob("sweeps/*/sweep_config.json"))
    content = data.read_text()
    with data.open("a") as file:
        file.writelines(line.replace("plus", "minus") + "\n" for line in content.splitlines())
    out, err = process.communicate(timeout=400)
    assert process.returncode == 2, (out, err)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "the training samples changed since the sweep began" in lines[0] and "Traceback" not in err
    scored = losses(folder)
    assert len(scored) < 3

    refused = sweep(f"resume={folder}")
    out, err = refused.communicate(timeout=400)
    assert refused.returncode == 2 and "the training samples changed since the sweep began" in err
    assert losses(folder) == scored
    data.write_text(content)
    (winner_config,) = folder.glob("trials/0000/train_config.json")
    edited = json.loads(winner_config.read_text())
    edited["data"]["train"] = "nowhere.jsonl"
    winner_config.write_text(json.dumps(edited))  # no one reads it back
    resumed = sweep(f"resume={folder}")
    out, err = resumed.communicate(timeout=400)
    assert resumed.returncode == 0, err
    ended = losses(folder)
    assert len(ended) == 3 and all(ended[name][: len(known)] == known for name, known in scored.items())
    assert json.loads((folder / "leaderboard.json").read_text())["reevaluation"]["agrees"]
    assert (folder / "best" / "adapter_model.safetensors").is_file()
