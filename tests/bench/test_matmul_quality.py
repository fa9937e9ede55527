"""Twins of trials in each mode of multiplication are laid out, trained once each, and compared."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest

from engine.config.matmul import Matmul
from tests.bench import matmul_quality as quality
from tests.search.curve_files import read_lines
from tests.search.tasks import TASKS, write


def test_each_trial_has_a_twin_in_each_mode_in_one_process_and_modes_change_seldom():
    shards = [quality.shard(quality.planned(), i, 4) for i in range(4)]
    twins = [twin for one in shards for twin in one]
    assert len({twin.id for twin in twins}) == len(twins) == 3 * (2 * 3 * 5 + 2 * 24)
    for one in shards:
        assert set(Counter((twin.part, twin.trial.id) for twin in one).values()) == {3}
        paired = [twin.mode for twin in one if twin.part == quality.PAIRED]
        changes = sum(before != after for before, after in itertools.pairwise(paired))
        assert changes <= 2 * -(-len(paired) // (3 * quality.IN_A_ROW))


def line(part: str, number: int, mode: Matmul, loss: float, outcome: str = "COMPLETE") -> dict:
    params = {"optim.learning_rate": 1e-3}
    return {"kind": "trial", "id": f"{part}{number}{mode}", "part": part, "task": "docs", "config": number, "seed": 0,
            "params": params, "mode": mode.value, "outcome": outcome, "loss": [9.0, loss]}  # fmt: skip


def test_the_summary_is_student_s_interval_of_the_pairs_and_says_whether_it_is_within_the_limit():
    plain = [line("paired", i, Matmul.BF16, 2.0 + i) for i in range(4)]
    near = [line("paired", i, Matmul.INT8_BACKWARD, 2.0 + i + 0.0001 * (-1) ** i) for i in range(4)]
    far = [line("paired", i, Matmul.INT8, 2.0 + i + 0.003 + 0.001 * (i % 2)) for i in range(3)]
    far.append(line("paired", 3, Matmul.INT8, 99.0, "DIVERGED"))
    found = quality.summary([*plain, *near, *far])["modes"]
    one, other = found["int8_backward"]["differences"]["all"], found["int8"]["differences"]["all"]
    assert one["pairs"] == 4 and one["mean"] == pytest.approx(0.0) and one["within"]
    assert one["high"] == pytest.approx(3.18245 * 0.0001 * (4 / 3) ** 0.5 / 2, rel=1e-4)
    assert other["pairs"] == 3 and other["mean"] == pytest.approx(0.003 + 0.001 / 3) and not other["within"]


def test_a_mode_that_ranks_otherwise_shows_in_correlation_and_regret():
    losses = [3.0, 2.0, 2.5, 4.0]
    plain = [line("ranked", i, Matmul.BF16, loss) for i, loss in enumerate(losses)]
    same = [line("ranked", i, Matmul.INT8_BACKWARD, loss + 0.1) for i, loss in enumerate(losses)]
    other = [line("ranked", i, Matmul.INT8, loss + (i == 1)) for i, loss in enumerate(losses)]
    found = quality.summary([*plain, *same, *other])
    ranks = {mode: of_mode["ranking"]["docs"] for mode, of_mode in found["modes"].items()}
    assert ranks["int8_backward"]["spearman"] == pytest.approx(1.0) and ranks["int8_backward"]["regret"] == 0.0
    assert ranks["int8"]["spearman"] < 0.9 and ranks["int8"]["chosen"] == 2 and ranks["int8"]["regret"] == 0.5
    assert "| int8 | docs | 4 |" in quality.table(found)


@pytest.fixture
def few_samples(tmp_path, monkeypatch):
    turns = [({"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} " * 9}) for i in range(80)]
    rows = [{"messages": list(pair)} for pair in turns]
    folder = tmp_path / "data"
    folder.mkdir()
    for name, task in TASKS.items():
        monkeypatch.setitem(TASKS, name, type(task)(task.about, lambda: (rows[:70], rows[70:]), task.lengths, {}))
    write(folder, "docs")
    monkeypatch.setattr("tests.search.recorded_trial.data_of", lambda name: (folder / "train.jsonl", folder / "eval.jsonl"))


def test_twins_are_trained_once_and_differ_in_nothing_but_the_mode(few_samples, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "IN_A_ROW", 1)
    out = tmp_path / "out.jsonl"
    common = ["--out", str(out), "--tiny", "--device", "cpu", "--model", str(tiny_model_dir), "--scratch", str(tmp_path / "s")]
    for limit in ("2", "3"):
        assert quality.main([*common, "--limit", limit]) == 0
    trials = [one for one in read_lines(out) if one["kind"] == "trial"]
    assert [one["mode"] for one in trials] == ["bf16", "int8_backward", "int8"]
    assert len({json.dumps([one["params"], one["seed"], one["tokens"]]) for one in trials}) == 1
    assert len({one["loss"][-1] for one in trials}) == 3 and {one["outcome"] for one in trials} == {"COMPLETE"}
