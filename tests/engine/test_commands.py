"""Test the engine's commands and the checks before training: replay, bad input, fused layers."""

import importlib
import json
import os
import re
import shutil
import signal
import types
from dataclasses import replace

import pytest
import torch

import engine.training.loop
from engine.__main__ import main
from engine.errors import InputError
from engine.model.device import pick_device
from engine.model.load import load_base
from engine.model.route import Route
from tests.support.trials import CPU, build, run


def test_the_command_line_replays_a_trial_and_shows_the_recorded_loss(tiny_config, tmp_path, capfd, recwarn):
    config = build(tiny_config)
    recorded = run(config, tmp_path)
    (tmp_path / "train_config.json").write_text(json.dumps(config.model_dump(mode="json")))
    capfd.readouterr()
    assert main([str(tmp_path / "train_config.json")]) == 0
    done = capfd.readouterr()
    last = done.out.splitlines()[-2].split()
    assert last[3] == last[4] == f"{recorded[-1].eval_loss:.5f}"
    assert done.err == "" and not [one for one in recwarn if issubclass(one.category, UserWarning)]


def test_the_cards_command_prints_what_torch_sees_and_an_error_is_its_line(monkeypatch, capsys):
    card = {"name": "RTX 4090", "major": 8, "minor": 9}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: types.SimpleNamespace(**card))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (6 * 2**30, 24 * 2**30))
    assert main(["cards"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__ and found["error"] is None
    assert found["cards"] == [
        {"name": "RTX 4090", "memory_gib": 24.0, "free_gib": 6.0, "capability": "8.9", "bfloat16": True}
    ]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: 1 / 0)
    assert main(["cards"]) == 0
    assert json.loads(capsys.readouterr().out)["error"] == "division by zero"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_trial_alone_saves_its_step_when_it_is_stopped_and_the_same_command_goes_on_from_there(
    tiny_config, tmp_path, monkeypatch, capsys, number
):
    config, steps, original = build(tiny_config), [], engine.training.loop._Run._step
    (tmp_path / "train_config.json").write_text(json.dumps(config.model_dump(mode="json")))
    (tmp_path / "whole").mkdir()
    expected = [report.eval_loss for report in run(config, tmp_path / "whole")]

    def step(trial):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), number)
        return original(trial)

    monkeypatch.setattr(engine.training.loop._Run, "_step", step)
    assert main([str(tmp_path / "train_config.json")]) == 130
    assert len(steps) == 3 and "ending after this step" in capsys.readouterr().err
    assert main([str(tmp_path / "train_config.json")]) == 0
    reports = (tmp_path / "replay" / "reports.jsonl").read_text().splitlines()
    assert [json.loads(line)["eval_loss"] for line in reports] == expected
    assert len(steps) == json.loads(reports[-1])["step"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": {"target_modules": ["qproj"]}}, r"lora\.target_modules = 'qproj'.*did you mean 'q_proj'"),
        ({"model": {"path": "/nowhere/model"}}, r"model\.path.*no such folder"),
        ({"data": {"train": "/nowhere/data.jsonl"}}, r"data\.train.*no such file"),
        ({"model": {"path": "builtin:gpt"}}, "unknown builtin"),
    ],
)
def test_prepare_refuses_bad_input_with_one_line_and_exit_code_2(tiny_config, tmp_path, sections, message, capsys):
    path = tmp_path / "configs.json"
    path.write_text(json.dumps([build(tiny_config, **sections).model_dump(mode="json")]))
    assert main(["prepare", str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert re.search(message, error), error


def test_prepare_says_which_layers_run_fused_and_strict_refuses_the_rest(tiny_config, tmp_path):
    from transformers import OlmoConfig, OlmoForCausalLM

    from engine.prepare import prepare

    assert prepare([build(tiny_config)]).layers == "2 of 2 decoder layers run fused"
    assert "original" in prepare([build(tiny_config, model={"layers": "original"})]).layers
    path = tmp_path / "olmo"
    shutil.copytree(tiny_config["model"]["path"], path)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 260}
    OlmoForCausalLM(OlmoConfig(**sizes, pad_token_id=0)).save_pretrained(path)
    odd = {"model": {"path": str(path)}}
    assert "OlmoDecoderLayer is not of a known family" in prepare([build(tiny_config, **odd)]).layers
    with pytest.raises(InputError, match=r"model\.layers.*0 of 2"):
        prepare([build(tiny_config, model={"path": str(path), "layers": "strict"})])
    # and it trains, on its own layers
    assert run(build(tiny_config, **odd), tmp_path / "generic")[-1].eval_loss > 0


def test_no_memory_is_predicted_for_a_model_that_makes_all_logits_at_once(tiny_config, monkeypatch):
    prepare = importlib.import_module("engine.prepare")
    config = build(tiny_config)
    assert prepare.prepare([config]).shape is not None
    slower = replace(prepare.inspect_model(config.model), route=Route(False, head_loss=False))
    monkeypatch.setattr(prepare, "inspect_model", lambda model: slower)
    assert prepare.prepare([config]).shape is None


def test_a_model_folder_without_config_is_refused(tiny_config, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"config\.json is not in it"):
        load_base(build(tiny_config, model={"path": str(tmp_path / "empty")}).model, CPU)


def test_cuda_without_a_card_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device"):
        pick_device("cuda")


def test_plan_shows_peak_and_speed_on_a_named_card_without_weights_or_data(tmp_path, capsys):
    shape = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    data = {"train": "nowhere", "max_seq_length": 4096}
    values = {"model": {"path": str(tmp_path)}, "data": data, "train": {"max_tokens": 10**6}}
    path = tmp_path / "train_config.json"
    path.write_text(json.dumps(values))
    assert main(["plan", str(path), "--card", "rtx4090"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"plan: micro-batch 1, ", shown) and re.search(r"peak \d+\.\d\d GiB, in: ", shown)
    assert re.search(r"base weights +\d", shown) and re.search(r"predicted speed: [\d,]+ tok/s", shown)
    assert main(["plan", str(path), "--card", "gtx1080"]) == 2
    assert capsys.readouterr().err.startswith("error: card = 'gtx1080': unknown card; known: rtx3090")
    values["train"]["memory_budget_gib"] = 4.0
    path.write_text(json.dumps(values))
    assert main(["plan", str(path), "--card", "rtx4090"]) == 2
    assert re.search(r"error: needs at least \d\.\d GiB \(predicted\), 4\.0 GiB are allowed", capsys.readouterr().err)
