"""Calibration on packed rows: varied settings, measured in pieces, summed up with the false fits first."""

import json

import pytest
import torch

from engine.adapter.lora import adapter_state
from engine.bench import ragged_rows
from engine.bench.shapes import family_kind, random_base
from engine.planning.compute_plan import ComputePlan
from engine.shape.families import FAMILIES, OTHER_TYPES
from engine.shape.policies import Policy

SOME = ("smollm2-135m", "llama-3.1-8b", "olmo-1b")


def record(predicted=10.0, reserved=10.0, **changes):
    values = {"model": "smollm2-135m", "kind": "plan", "length": 512, "rank": 8, "budget_gib": 23.5, "fits": True}
    peaks = {"predicted_gib": predicted - 0.5, "predicted_reserved_gib": predicted, "peak_allocated_gib": reserved - 0.5}
    found = {"peak_reserved_gib": reserved, "num_out_of_memory": 0, "num_retries": 0, "plan": "", "tokens_per_second": 1}
    return {**values, **peaks, **found, "predicted_tokens_per_second": 1, **changes}


def test_the_settings_are_enough_and_cover_every_value_and_nearly_every_family():
    settings = [values for model in ragged_rows.MODELS for values in ragged_rows.draw(model, 6)]
    assert len(settings) >= 120 and len({ragged_rows._key(values) for values in settings}) == len(settings)
    for name, values in (("length", ragged_rows.LENGTHS), ("rank", ragged_rows.RANKS), ("kind", ragged_rows.KINDS)):
        assert {s[name] for s in settings} == set(values)
    kinds = {family_kind(model) for model in ragged_rows.MODELS}
    missed = {kind for kind in FAMILIES if kind not in kinds and kind not in OTHER_TYPES}
    like_others = {"gemma4_unified", "vaultgemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"}
    mixtures = {kind for kind, family in FAMILIES.items() if family.experts is not None}  # their rows: engine/bench/results
    assert missed - like_others - mixtures == {"seed_oss", "hyperclovax", "cwm", "qwen3_5"}
    assert len(kinds - set(FAMILIES)) == 3


def test_settings_that_a_file_holds_are_not_measured_again(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(ragged_rows, "random_base", lambda *arguments: None)
    monkeypatch.setattr(ragged_rows, "pick_dtype", lambda *arguments: None)
    monkeypatch.setattr(ragged_rows, "free", lambda device: None)
    monkeypatch.setattr(ragged_rows, "measure_one", lambda base, values: measured.append(values) or record(**values))
    command = ["--out", str(tmp_path / "a.jsonl"), "--models", *SOME, "--per-model"]
    assert ragged_rows.main([*command, "2"]) == 0 and len(measured) == 6
    assert ragged_rows.main([*command, "3"]) == 0 and len(measured) == 9
    assert ragged_rows.main([*command, "4", "--budget-s", "0"]) == 0 and len(measured) == 9
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len({ragged_rows._key(line) for line in lines}) == 9 and lines[0]["card"] == "a card"


def test_files_of_other_records_are_named_in_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(record()) + "\n")
    for name, text in (("other", '{"seed": 1}'), ("broken", '{"mod'), ("list", "[]"), ("missing", None)):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(SystemExit, match=f"{name} must hold records of this command") as ended:
            ragged_rows.main(["--summary", str(tmp_path / "a.jsonl"), str(tmp_path / name)])
        assert len(str(ended.value).splitlines()) == 1


def test_the_summary_counts_false_fits_and_errors():
    good = [record(10.0, 10.0 * (1 + i / 1000)) for i in range(40)]
    text = ragged_rows.summary([*good, record(12.0, 10.0), record(fits=False), record(num_out_of_memory=1, model="qwen3-4b")])
    assert "42 settings, 2 models: 1 false fits" in text and "qwen3-4b plan 512" in text
    assert "reserved: |error| p95 3.7%, from -3.8% to +20.0%" in text


def test_the_steps_of_a_setting_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(ragged_rows, "adamw_8bit", torch.optim.AdamW)
    monkeypatch.setattr(ragged_rows, "TOKENS_PER_STEP", 1024)
    values = {"model": "tiny", "kind": "plan", "length": 128, "rank": 8, "budget_gib": 23.5}
    config, base = ragged_rows.train_config(values), random_base("tiny", torch.device("cpu"), torch.float32, True)
    layers = ragged_rows.attach(base.model, base.linear_names, config.lora, 0)
    before = {name: value.clone() for name, value in adapter_state(layers).items()}
    assert ragged_rows._steps(base, layers, config, ComputePlan(2, Policy.KEEP, 0, 0, 0.0), 512) > 0
    assert not any(torch.equal(before[name], value) for name, value in adapter_state(layers).items())
