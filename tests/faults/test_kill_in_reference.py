"""A worker killed inside the reference model's pass goes on after the last part that the cache has."""

import json
import os
import signal
import subprocess
import sys

import pytest

from engine.config.parsing import to_json
from engine.trial_report import read_reports
from tests.support.preferences import pair_rows, preference_values, write_rows
from tests.support.trials import build, same_numbers

pytestmark = pytest.mark.faults
PROGRAM = """
import json, os, signal, sys
from pathlib import Path
import engine.preference.reference_logps as reference
from engine.config.trial import load_train_config
from engine.training.loop import train
config, folder, kill_at = load_train_config(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
reference.PART_TOKENS = {"cpu": 512}
rows = []
original = reference._computed
def computed(base, view, part, longest, before_each):
    rows.append(1)
    if len(rows) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(base, view, part, longest, before_each)
reference._computed = computed
folder.mkdir(exist_ok=True)
list(train(config, folder))
print(json.dumps(len(rows)))
"""


def run(config_file, folder, cache, kill_at=0):
    environment = {**os.environ, "QLORA_SWEEP_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(config_file), str(folder), str(kill_at)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_a_killed_reference_pass_goes_on_and_the_numbers_are_those_of_an_undisturbed_trial(tiny_config, tmp_path):
    values = preference_values(tiny_config, write_rows(tmp_path / "pairs.jsonl", pair_rows(48)), beta=0.5)
    values["train"].update(max_tokens=1024, num_reports=1, tokens_per_step=512)
    file = tmp_path / "config.json"
    file.write_text(to_json(build(values)))
    whole = run(file, tmp_path / "whole", tmp_path / "cache of whole")
    assert whole.returncode == 0, whole.stderr
    killed = run(file, tmp_path / "killed", tmp_path / "cache of killed", kill_at=4)
    assert killed.returncode == -signal.SIGKILL
    again = run(file, tmp_path / "killed", tmp_path / "cache of killed")
    assert again.returncode == 0, again.stderr
    parts, left = (json.loads(one.stdout.splitlines()[-1]) for one in (whole, again))
    assert left == parts - 3
    assert same_numbers(read_reports(tmp_path / "whole"), read_reports(tmp_path / "killed"))
    both = [(tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert both[0] == both[1]
    assert not list((tmp_path / "cache of killed").glob(".*building*"))
