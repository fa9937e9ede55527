"""Whole trials on a tiny mixture: rank and targets, stops, exports, and the settings that are refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from engine.adapter.lora import attach, detach
from engine.adapter.peft_files import export_adapter
from engine.adapter.portable import read_adapter
from engine.adapter.start import attach_started
from engine.config.trial import ModelConfig
from engine.errors import InputError, Interrupted
from engine.evaluation.reevaluate import evaluate_adapter
from engine.model.guard import ALLOWED
from engine.model.inspect import known_shape
from engine.model.load import load_base
from engine.prepare import prepare
from engine.training.loop import train
from tests.support.model_families import MIXTURE_OF_GEMMA4, peft_difference
from tests.support.trials import CPU, build, run, same_numbers

BOTH = ["attention", "experts"]


def config_of(tiny_config, tiny_mixture_dir, **lora):
    return build(tiny_config, model={"path": str(tiny_mixture_dir)}, lora={"target_modules": BOTH, **lora})


def test_a_sweep_over_rank_and_targets_learns_and_counts_each_adapter(tiny_config, tiny_mixture_dir, tmp_path):
    grid = [(1, "attention"), (4, "experts"), (4, BOTH)]
    configs = [config_of(tiny_config, tiny_mixture_dir, rank=rank, target_modules=targets) for rank, targets in grid]
    facts = prepare(configs)
    attention, experts = (32 + 64) * 2 + (64 + 64) * 2, 4 * ((64 + 64) + (32 + 64))
    one = {"attention": 2 * attention, "experts": 2 * experts, str(BOTH): 2 * (attention + experts)}
    assert facts.num_trainable == [rank * one[str(targets)] for rank, targets in grid]
    assert any("experts, in NF4" in note for note in facts.model_notes)
    base = load_base(configs[0].model, CPU)
    losses = {}
    for number, (config, point) in enumerate(zip(configs, grid)):
        reports = run(config, tmp_path / str(number), base)
        losses[point[0], str(point[1])] = reports[-1].eval_loss
        assert reports[-1].eval_loss < reports[0].eval_loss
        assert (read_adapter(tmp_path / str(number) / "adapter").experts != []) == (point[1] != "attention")
    assert losses[4, str(BOTH)] < losses[1, "attention"]
    assert len(set(losses.values())) == len(grid)


def test_a_trial_that_is_stopped_goes_on_with_the_undisturbed_trial_s_numbers_and_bits(tiny_config, tiny_mixture_dir, tmp_path):
    config = config_of(tiny_config, tiny_mixture_dir)
    whole = run(config, tmp_path / "whole")
    calls, base = iter(range(1, 10**6)), load_base(config.model, CPU)
    (tmp_path / "pieces").mkdir()
    reports = []
    with pytest.raises(Interrupted):
        reports += train(config, tmp_path / "pieces", base=base, interrupted=lambda: next(calls) == 3)
    reports += train(config, tmp_path / "pieces", base=base)
    assert same_numbers(whole, reports)
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "pieces"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    again = evaluate_adapter(config, tmp_path / "pieces" / "adapter")
    assert again.eval_loss == pytest.approx(min(report.eval_loss for report in reports), abs=1e-6)


def test_a_second_stage_starts_from_an_adapter_with_experts(tiny_config, tiny_mixture_dir, tmp_path):
    first = config_of(tiny_config, tiny_mixture_dir, rank=2)
    ended = min(report.eval_loss for report in run(first, tmp_path / "first"))
    start = {"rank": 4, "start_from": str(tmp_path / "first" / "adapter")}
    still = build(
        tiny_config, model={"path": str(tiny_mixture_dir)}, lora={"target_modules": BOTH, **start}, optim={"learning_rate": 1e-9}
    )
    prepare([still])
    assert run(still, tmp_path / "second")[0].eval_loss == pytest.approx(ended, abs=1e-4)


@pytest.mark.parametrize(
    "lora",
    [
        {"rank_pattern": {"experts.down_proj": 2}},
        {"target_modules": ["layers.0.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"]},
    ],
)
def test_a_start_is_the_adapter_whatever_the_ranks_and_weights_of_its_experts(lora, tiny_config, tiny_mixture_dir, tmp_path):
    config = config_of(tiny_config, tiny_mixture_dir, **lora)
    base = load_base(config.model, CPU)
    layers = attach(base.model, base.linear_names, config.lora, 0)
    given = {name: tuple(p.data.normal_().clone() for p in layer.parameters_of()) for name, layer in layers.items()}
    export_adapter(tmp_path / "first", config, layers, base.model, base.tokenizer)
    detach(base.model, layers)
    start = {**lora, "start_from": str(tmp_path / "first")}
    again = attach_started(base.model, base.linear_names, config_of(tiny_config, tiny_mixture_dir, **start))
    assert again.keys() == given.keys()
    assert all(torch.equal(again[name].lora_a, a) and torch.allclose(again[name].lora_b, b) for name, (a, b) in given.items())
    detach(base.model, again)
    wider = config_of(tiny_config, tiny_mixture_dir, **{**start, "rank": 8, "rank_pattern": {}})
    wide = attach_started(base.model, base.linear_names, wider)
    assert all(layer.rank == 8 and layer.lora_a.any(dim=1).all() for layer in wide.values())  # zeros in A and B never learn
    detach(base.model, wide)


@pytest.mark.parametrize(
    ("lora", "line"),
    [
        ({"lora_dropout": 0.1}, r"lora.lora_dropout = 0.1: must be 0 with adapters on experts"),
        ({"target_modules": ["expert"]}, r"lora.target_modules = 'expert': matches no linear layer"),
    ],
)
def test_what_experts_cannot_have_is_one_line_before_anything_is_paid_for(lora, line, tiny_config, tiny_mixture_dir):
    with pytest.raises(InputError, match=line):
        prepare([config_of(tiny_config, tiny_mixture_dir, **lora)])


@pytest.mark.parametrize(("family", "numbers"), [("qwen3_5_moe_text", {}), ("gemma4_text", MIXTURE_OF_GEMMA4)])
def test_mixtures_with_other_layers_beside_their_experts_are_trained_and_read_by_peft(family, numbers, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_SWEEP_CACHE", str(tmp_path / "cache"))
    assert peft_difference(family, tmp_path, **numbers) < ALLOWED
    names = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_parameters"]
    assert {name.rpartition(".")[2] for name in names} == {"gate_up_proj", "down_proj"}
    shape = known_shape(ModelConfig(path=str(tmp_path / "model")))  # a forecast; Gemma 4's layers are the library's, and measured
    assert shape.experts is not None and (shape.library is not None) == (family == "gemma4_text")
