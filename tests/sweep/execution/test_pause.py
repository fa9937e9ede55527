"""A trial that paused at a rung goes on in any worker as if it had never stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import engine.training.loop
from engine.training.loop import train
from sweep.execution import worker
from sweep.folder.notes import is_training
from tests.support.reports import PART_SECONDS
from tests.support.slots import VARIANTS, Slot, variant

TIMED = {"tokens_per_second", "step_time_ms", "elapsed_s", "setup_s", "peak_allocated_gib", "peak_reserved_gib", *PART_SECONDS}


def numbers(trial_folder: Path) -> list[dict]:
    lines = map(json.loads, (trial_folder / "reports.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


@pytest.mark.parametrize("where", ["the same worker", "another worker, while the first is idle"])
def test_a_paused_trial_goes_on_bit_for_bit(tmp_path, tiny_config, monkeypatch, where):
    monkeypatch.setattr(worker, "LOCK_PATIENCE_S", 0.0)  # the idle worker must not hold the trial
    config, trial, first = variant(tiny_config, VARIANTS[0]), tmp_path / "trial", Slot()
    (tmp_path / "whole").mkdir()
    list(train(config, tmp_path / "whole"))
    first.run(config, trial, num_rungs=1)
    if where == "the same worker":
        first.run(variant(tiny_config, VARIANTS[1]), tmp_path / "other", num_rungs=2)
        again = first
    else:
        again = Slot()
    assert again.run(config, trial)[-1]["outcome"] == "COMPLETE"
    assert numbers(trial) == numbers(tmp_path / "whole")
    for name in ("adapter/adapter_model.safetensors", "checkpoint/adapter.safetensors"):
        assert (trial / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_worker_that_leaves_a_paused_trial_does_not_touch_it_any_more(tmp_path, tiny_config, monkeypatch):
    config, trial, first, second = variant(tiny_config, VARIANTS[0]), tmp_path / "trial", Slot(), Slot()
    first.run(config, trial, num_rungs=1)
    seen, step = [], engine.training.loop._Run._step

    def leave(run):
        if not seen:
            first.worker._close()
        seen.append(is_training(trial))
        return step(run)

    monkeypatch.setattr(engine.training.loop._Run, "_step", leave)
    second.run(config, trial, num_rungs=2)
    assert seen and all(seen)  # the second worker's note stays: a stop waits for it to save
