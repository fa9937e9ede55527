"""All ways of generating make the same answers in fp32, and the base is afterwards as it was."""

from __future__ import annotations

import json

import pytest
import torch

from engine.evaluation import decoding
from engine.layers.swap import FusedLayer
from engine.quant.frozen_linear import FrozenLinear
from tests.bench import generation

TINY = ["--model", "tiny", "--batches", "1", "2", "--tokens", "6", "--other-tokens", "4"]


def test_every_way_has_a_row_for_each_number_of_answers_and_all_make_the_same(tmp_path, capsys):
    file = tmp_path / "rows" / "generation.jsonl"
    assert generation.main([*TINY, "--json", str(file), "--commit", "abc"]) == 0
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    assert [(row["way"], row["batch"]) for row in rows] == [(way, batch) for way in generation.WAYS for batch in (1, 2)]
    assert {row["same_tokens"] for row in rows} == {1.0} and {row["git.commit"] for row in rows} == {"abc"}
    for row in rows:
        assert row["tokens"] == (6 if row["way"] == "ours" else 4)
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * row["tokens"] / row["seconds"])
    assert capsys.readouterr().out.count("100%") == len(rows)


def test_a_way_leaves_the_base_as_it_was_even_when_memory_runs_out(monkeypatch):
    base, recorder = generation.make_base("tiny", torch.device("cpu")), decoding.recorder
    prompts = generation.make_prompts(2, 512)
    found, answers = generation.measure(base, "ours", prompts, 3)
    assert [len(answer) for answer in answers] == [3, 3] and found["seconds"] > 0.0
    monkeypatch.setattr(base.model, "generate", lambda **_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    assert generation.measure(base, "library-plain", prompts, 3) == ({"error": "out of memory"}, [])
    assert [one for one in base.model.modules() if isinstance(one, FusedLayer)] and decoding.recorder is recorder
    assert not [one for one in base.model.modules() if isinstance(one, FrozenLinear) and one._plain is not None]
    assert generation.measure(base, "ours", prompts, 3)[1] == answers


def test_the_share_of_equal_tokens_counts_places_that_both_have():
    assert generation.same_tokens([[1, 2], [3]], [[1, 9, 9], [3, 4]]) == pytest.approx(2 / 3)
    assert generation.same_tokens([[1]], []) is None and generation.same_tokens([], [[1]]) is None


@pytest.mark.parametrize("wrong", ["--batches 0", "--tokens 2", "--other-tokens 1", "--ways theirs"])
def test_wrong_options_are_refused_before_anything_is_written(tmp_path, wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        generation.main([*TINY, "--json", str(tmp_path / "a" / "b"), *wrong.split()])
    assert wrong.split()[0] in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.iterdir())


def test_a_used_up_budget_leaves_rows_out(tmp_path, capsys):
    file = tmp_path / "generation.jsonl"
    assert generation.main([*TINY, "--json", str(file), "--budget-s", "0"]) == 0
    assert not file.exists() and capsys.readouterr().out.count("--budget-s 0 is used up") == 2 * len(generation.WAYS)
