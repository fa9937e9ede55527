"""Each variant's step is timed around one base, which is afterwards as it was."""

from __future__ import annotations

import json

import pytest
import torch

from engine.adapter.lora import LoraLinear
from engine.bench.shapes import random_base
from tests.bench import variant_steps

TINY = ["--model", "tiny", "--batch", "2", "--length", "16", "--steps", "1"]


def test_every_kind_has_a_row_of_its_own_and_plain_lora_comes_twice(tmp_path, capsys):
    file = tmp_path / "rows" / "steps.jsonl"
    assert variant_steps.main([*TINY, "--json", str(file), "--commit", "abc"]) == 0
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    assert [row["kind"] for row in rows] == [*variant_steps.KINDS, "plain"]
    by_kind = {row["kind"]: row for row in rows if "error" not in row}
    assert {row["kind"]: row["error"] for row in rows if "error" in row} == {"paged": "needs a card"}
    plain = by_kind["plain"]
    for row in by_kind.values():
        assert row["step_ms"] > 0.0 and row["tokens_per_second"] == pytest.approx(2 * 16 / row["step_ms"] * 1e3)
        assert row["pass_ms"] > 0.0 and row["card"] == "CPU" and row["git.commit"] == "abc" and not row["is_recorded"]
    same_start = [name for name in by_kind if name not in ("neftune", "dropout", "dora_dropout")]
    assert all(by_kind[name]["first_loss"] == pytest.approx(plain["first_loss"], abs=1e-5) for name in same_start)
    assert by_kind["neftune"]["first_loss"] != plain["first_loss"]
    assert {by_kind[name]["last_loss"] == plain["last_loss"] for name in ("lion", "loraplus", "muon")} == {False}
    assert rows[0]["last_loss"] == rows[-1]["last_loss"]  # nothing of the kinds between is left
    assert by_kind["pissa"]["parameters"] == 2 * plain["parameters"] < 2 * by_kind["dora"]["parameters"]
    assert "1.000 x" in capsys.readouterr().out


def test_a_kind_that_the_model_refuses_or_that_runs_out_of_memory_is_a_row(monkeypatch):
    base = random_base("tiny", torch.device("cpu"), torch.float32, True)
    row = variant_steps.make_row(1, 16, 512)
    monkeypatch.setitem(variant_steps.KINDS, "odd", variant_steps.Kind({"rank_pattern": {"no_such_layer": 4}}))
    assert "no_such_layer" in variant_steps.measure_kind(base, "odd", row, 16, 1)["error"]
    monkeypatch.setattr(variant_steps._Steps, "update", lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    assert variant_steps.measure_kind(base, "plain", row, 16, 1) == {"error": "out of memory"}
    assert not [one for one in base.model.modules() if isinstance(one, LoraLinear)]
    monkeypatch.undo()
    assert "error" not in variant_steps.measure_kind(base, "plain", row, 16, 1)


@pytest.mark.parametrize("wrong", ["--batch 0", "--steps x", "--kinds no-such", "--model nope"])
def test_wrong_options_are_refused_before_anything_is_written(tmp_path, wrong):
    with pytest.raises(SystemExit, match="2"):
        variant_steps.main([*TINY, "--json", str(tmp_path / "a" / "b"), *wrong.split()])
    assert not list(tmp_path.iterdir())
