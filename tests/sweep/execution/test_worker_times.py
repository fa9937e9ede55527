"""A worker says what its seconds went to, and what was lost between two trials."""

from __future__ import annotations

import json

import pytest

from engine.trial_report import PartClock
from sweep.folder.steady_clock import since_boot
from tests.support.slots import VARIANTS, Slot, variant


def test_dead_time_is_from_the_end_of_one_trial_to_the_first_step_of_the_next(tmp_path, tiny_config, monkeypatch):
    slot, clock = Slot(), [1000.0]
    monkeypatch.setattr("sweep.execution.worker.since_boot", lambda: clock[0])
    monkeypatch.setattr("sweep.execution.worker.time.time", lambda: clock[0])
    monkeypatch.setattr("sweep.execution.worker.PartClock", lambda clock: PartClock())  # steps take time
    first = slot.run(variant(tiny_config, VARIANTS[1]), tmp_path / "first", num_rungs=2)
    assert "dead_time_s" not in json.loads(first[-1]["timing"])
    clock[0] += 5.0
    second = json.loads(slot.run(variant(tiny_config, VARIANTS[2]), tmp_path / "second", num_rungs=1)[0]["timing"])
    setup_s = json.loads((tmp_path / "second" / "reports.jsonl").read_text())["setup_s"]
    assert setup_s > 0.0 and second["dead_time_s"] == 5.0 + setup_s
    assert second["began_s"] == 1005.0


def test_a_worker_says_what_each_second_of_a_trial_went_to_also_of_one_that_ends_between_reports(
    tmp_path, tiny_config, monkeypatch
):
    slot, read, begun = Slot(), [], []

    def now() -> float:
        read.append(since_boot())
        return read[-1]

    monkeypatch.setattr("sweep.execution.worker.PartClock", lambda clock: begun.append(None) or PartClock(clock=now))
    reported = slot.run(variant(tiny_config, VARIANTS[1]), tmp_path / "first", num_rungs=2)
    parts = [json.loads(result["timing"])["parts"] for result in reported]
    assert {"start", "model", "data", "attach", "train", "eval", "save"} <= set(parts[0]) and "model" not in parts[1]
    assert parts[1]["train"] > 0.0 and parts[1]["idle"] > 0.0
    (tmp_path / ".stop").touch()
    (ended,) = slot.run(variant(tiny_config, VARIANTS[1]), tmp_path / "first", num_rungs=1)
    assert (ended["outcome"], ended["report"]) == ("RUNNING", "") and "start" in json.loads(ended["timing"])["parts"]
    assert len(begun) == 2  # a clock for each stay
    (tmp_path / ".stop").unlink()
    read.clear()
    last = [json.loads(result["timing"])["parts"] for result in slot.run(variant(tiny_config, VARIANTS[2]), tmp_path / "third")]
    assert sum(sum(each.values()) for each in last) == pytest.approx(read[-1] - read[0], abs=1e-3)
