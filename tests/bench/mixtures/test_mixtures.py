"""Ours and PEFT train tiny mixtures here; Unsloth's folder reads as the library reads a published one."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from engine.bench.rows import Setting
from engine.bench.shapes import SHAPES
from engine.planning.cards import find_card
from tests.bench.mixtures import __main__ as mixtures
from tests.bench.mixtures import child, folder
from tests.bench.mixtures.builders import shape_with
from tests.bench.mixtures.job import TARGETS, MixtureRow, rows_of

SHRUNK = {"hidden_size": 64, "vocab_size": 512, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
          "num_hidden_layers": 3, "num_experts_per_tok": 2}  # fmt: skip
SMALL = {"gpt-oss-20b": {**SHRUNK, "intermediate_size": 64, "num_local_experts": 4},
         "qwen3-30b-a3b": {**SHRUNK, "moe_intermediate_size": 64, "num_experts": 4}}  # fmt: skip
SETTING = Setting(batch=1, length=48, rank=4, keep_layers=0, cap_gib=23.5, weight_cache_gib=2.0, cuda_graphs=True, steps=2,
                  targets=TARGETS)  # fmt: skip


@pytest.fixture(params=SMALL)
def model(request, monkeypatch) -> str:
    monkeypatch.setitem(SHAPES, request.param, {**SHAPES[request.param], **SMALL[request.param]})
    return request.param


def test_ours_and_peft_train_the_same_mixture_on_the_same_tokens(model, monkeypatch):
    monkeypatch.setitem(SHAPES, f"{model}, 2 layers", {})  # taken out again at the end
    rows = rows_of(["ours", "peft"], replace(SETTING, model=model, cuda_graphs=False), 2, False, False, True)
    found = {}
    for row in rows:
        parts = list(child.measure(MixtureRow.of(json.loads(json.dumps(asdict(row)))), None))
        found[row.system] = {name: value for part in parts for name, value in part.items()}
        assert [next(iter(part)) for part in parts] == ["card", "load_s", "trained_values", "first_step_s", "tokens_per_second"]
    ours, peft = found["ours"], found["peft"]
    assert ours["trained_values"] == peft["trained_values"]
    assert {round(one["first_loss"] - math.log(SHRUNK["vocab_size"]), 1) for one in (ours, peft)} == {0.0}  # untrained
    assert ours["tokens_per_second"] == pytest.approx(48e3 / ours["step_time_ms"]) and ours["last_loss"] != ours["first_loss"]
    assert ours["fastest_ms"] <= ours["step_time_ms"] <= ours["slowest_ms"]


def test_unsloth_s_folder_has_the_library_s_weights_and_each_layer_s_experts(model, tmp_path):
    from safetensors import safe_open

    target = tmp_path / "model"
    folder.write_folder(model, 2, target)
    places = json.loads((target / folder.INDEX).read_text())["weight_map"]
    config, is_oss = json.loads((target / "config.json").read_text()), model == "gpt-oss-20b"
    assert config["num_hidden_layers"] == 2 and ("quantization_config" in config) == is_oss
    ends = ["gate_up_projs.3.weight.absmax", "down_projs.0.bias"] if is_oss else ["3.gate_proj.weight", "0.down_proj.weight"]
    assert all(f"model.layers.{i}.mlp.experts.{end}" in places for i in range(2) for end in ends)
    for name, file in places.items():
        with safe_open(target / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    assert {file.name for file in target.iterdir()} >= {"tokenizer.json", *places.values()}
    assert not list(tmp_path.glob("*.part"))


def test_the_planner_is_asked_for_the_row_s_own_setting(model, monkeypatch):
    name = f"{model}, 3 layers"
    monkeypatch.setitem(SHAPES, name, {})
    setting = replace(SETTING, model=shape_with(model, 3), length=8192)
    plain, kept = (child.predicted(one, False, find_card("h100")) for one in (setting, replace(setting, policy="keep")))
    assert plain["predicted_gib"] < kept["predicted_gib"] <= kept["predicted_reserved_gib"] < 23.5
    refused = child.predicted(replace(setting, targets=("no_such",)), False, find_card("h100"))
    assert "no_such" in refused["unpredicted"]


def test_ragged_rows_are_full_of_unequal_samples():
    row = child.ragged(replace(SETTING, model="tiny", length=2048), 0)
    lengths = torch.diff(row.document_offsets)
    assert lengths.sum() == 2048 and len(set(lengths.tolist())) > 3


def test_each_row_runs_with_its_own_caches_packages_and_switch(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/given")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/warm")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    ours, unsloth = rows_of(["ours", "unsloth"], SETTING, 2, False, True, False)
    found = mixtures.variables_of(unsloth, tmp_path, tmp_path / "place")
    assert found["PYTHONPATH"] == f"{tmp_path}:/given" and found["UNSLOTH_COMPILE_DISABLE"] == "1"
    assert found["TRITON_CACHE_DIR"] == "/warm" and found["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path / "place"))
    assert not {"PYTHONPATH", "UNSLOTH_COMPILE_DISABLE"} & mixtures.variables_of(ours, tmp_path, tmp_path).keys()
    assert ours.record()["cuda_graphs"] and ours.record()["offloads"] and "cuda_graphs" not in unsloth.record()
    assert unsloth.record()["targets"] == ["attention", "experts"] and unsloth.label == "unsloth, not compiled"


def test_a_row_that_fails_keeps_what_it_had_measured(tmp_path, monkeypatch, capsys):
    asked = []

    def run(arguments: list[str], place: Path, timeout_s: float, variables: dict[str, str]) -> list[dict]:
        asked.append((arguments[1], json.loads(arguments[2])["system"], place.parent == tmp_path / "s", timeout_s))
        return [{"card": "C", "git.commit": ""}, {"first_step_s": 57.5}, {"error": "timed out"}]

    monkeypatch.setattr(mixtures, "run_python_all", run)
    monkeypatch.setattr(mixtures, "run_python", lambda arguments, *_: asked.append(arguments[1]) or {"error": "no disk"})
    file = tmp_path / "rows" / "a.jsonl"
    given = ["--systems", "peft", "unsloth", "--layers", "2", "--scratch", str(tmp_path / "s"), "--json", str(file)]
    assert mixtures.main([*given, "--child-timeout-s", "9", "--commit", "abc"]) == 0
    peft, unsloth = (json.loads(text) for text in file.read_text().splitlines())
    assert asked == [("tests.bench.mixtures.child", "peft", True, 9.0), "tests.bench.mixtures.folder"]
    assert (peft["first_step_s"], peft["error"], peft["git.commit"]) == (57.5, "timed out", "abc")
    assert unsloth["error"] == "no model folder: no disk" and unsloth["layers"] == 2
    assert "57.5" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["--layers 0", "--steps 0", "--peer-path nowhere", "--model tiny", "--ragged"])
def test_wrong_options_are_refused_before_anything_is_written(tmp_path, wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        mixtures.main(["--json", str(tmp_path / "a" / "b"), *wrong.split()])
    assert wrong.split()[0] in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.iterdir())
