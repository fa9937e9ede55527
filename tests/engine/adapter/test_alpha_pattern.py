"""Layers of other alphas train, go on, and are what PEFT makes of the same patterns."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig as Theirs
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from engine.adapter.flat import FlatAdapter
from engine.adapter.lora import attach, detach
from engine.adapter.peft_files import export_adapter
from engine.adapter.portable import read_adapter
from engine.adapter.start import attach_started
from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.data.packing import collate
from engine.data.views import load_data
from engine.model.load import load_base, nf4_load_config
from engine.quant.bnb import keep_as_stored
from tests.support.trials import CPU, build, run, run_stopped, same_numbers

ALPHAS = {"down_proj": 3.0, r"layers\.0\.self_attn\.[qv]_proj": 20.0}
RANKS = {"down_proj": 2, "gate_proj": 6}
LORA = {"rank": 4, "lora_alpha": 6.0, "alpha_pattern": ALPHAS, "rank_pattern": RANKS}
VARIANTS = [{}, {"use_rslora": True, "use_dora": True, "lora_dropout": 0.1}, {"start": "pissa"}]


def peft_on_nf4(config, make):
    nf4 = nf4_load_config(True, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        config.model.path, quantization_config=nf4, device_map={"": "cpu"}, dtype=torch.float32
    )
    keep_as_stored(model)
    return make(model).eval()


def losses(model, view):
    with torch.no_grad():
        rows = [collate([view[i]]) for i in range(3)]
        logits = [model(input_ids=row.input_ids_T[None], use_cache=False).logits[0].float() for row in rows]
    return [torch.nn.functional.cross_entropy(one, row.labels_T).item() for one, row in zip(logits, rows, strict=True)]


def test_a_layer_has_peft_s_scaling_for_the_same_patterns(tiny_config, base):
    config = build(tiny_config, lora={**LORA, "rank_pattern": {}})
    layers = attach(base.model, base.linear_names, config.lora, 0)
    detach(base.model, layers)
    theirs = Theirs(r=4, lora_alpha=6, alpha_pattern=ALPHAS, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(config.model.path), theirs)
    found = {name: model.get_submodule(f"base_model.model.{name}").scaling["default"] for name in layers}
    assert found == {name: layer.scaling for name, layer in layers.items()} and set(found.values()) == {0.75, 1.5, 5.0}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trial_goes_on_exactly_and_peft_has_its_losses(variant, tiny_config, tmp_path, base):
    config = build(tiny_config, lora={**LORA, **variant})
    whole, stopped = run(config, tmp_path / "whole", base), run_stopped(config, tmp_path / "stopped", base)
    assert same_numbers(whole, stopped) and whole[-1].eval_loss < whole[0].eval_loss
    _, view = load_data(config.data, base.tokenizer)
    layers = attach(base.model, base.linear_names, config.lora, 0)
    for i, layer in enumerate(layers.values()):
        torch.nn.init.normal_(layer.lora_b, std=0.1, generator=torch.Generator().manual_seed(i))
    export_adapter(tmp_path / "adapter", config, layers, base.model, base.tokenizer)
    FlatAdapter(layers, base.dtype)
    base.model.eval()
    with torch.no_grad():
        rows = [collate([view[i]]) for i in range(3)]
        ours = [(base.loss(row) / row.num_targets).item() for row in rows]
    detach(base.model, layers)
    theirs = losses(peft_on_nf4(config, lambda model: PeftModel.from_pretrained(model, str(tmp_path / "adapter"))), view)
    assert theirs == pytest.approx(ours, abs=5e-5)


@pytest.mark.parametrize("variant", VARIANTS[:2])
def test_fused_layers_have_the_gradients_of_unfused_ones(variant, tiny_config):
    gradients = []
    for option in ("auto", "original"):
        config = build(tiny_config, lora={**LORA, **variant, "lora_dropout": 0.0}, model={"layers": option})
        base = load_base(config.model, CPU)
        layers = attach(base.model, base.linear_names, config.lora, 0)
        for i, layer in enumerate(layers.values()):
            torch.nn.init.normal_(layer.lora_b, std=0.1, generator=torch.Generator().manual_seed(i))
        FlatAdapter(layers, base.dtype)
        view, _ = load_data(config.data, base.tokenizer)
        base.model.train()
        base.loss(collate([view[0], view[1]]).to(base.device)).backward()
        gradients.append({name: [p.grad.clone() for p in layer.parameters_of()] for name, layer in layers.items()})
        detach(base.model, layers)
    for name, ours in gradients[0].items():
        for one, other in zip(ours, gradients[1][name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_second_stage_with_other_alphas_starts_with_the_first_one_s_product(tiny_config, tmp_path, base):
    first = build(tiny_config, lora=LORA)
    layers = attach(base.model, base.linear_names, first.lora, 0)
    for layer in layers.values():
        layer.lora_b.data.normal_()
    products = {name: layer.scaling * layer.lora_b.detach() @ layer.lora_a.detach() for name, layer in layers.items()}
    export_adapter(tmp_path, first, layers, base.model, base.tokenizer)
    detach(base.model, layers)
    plain = read_adapter(tmp_path)
    for name, (a, b) in plain.layers.items():
        torch.testing.assert_close(plain.scaling * b @ a, products[name])
    second = build(tiny_config, lora={"rank": 8, "alpha_pattern": {"q_proj": 1.0}, "start_from": str(tmp_path)})
    again = attach_started(base.model, base.linear_names, second)
    for name, layer in again.items():
        torch.testing.assert_close(layer.scaling * layer.lora_b @ layer.lora_a, products[name], rtol=1e-4, atol=1e-5)
    detach(base.model, again)


def test_alphas_are_part_of_a_fingerprint_and_older_ones_stay(tiny_config):
    config = build(tiny_config, lora={"alpha_pattern": {"q_proj": 2}})
    assert config.fingerprint() != build(tiny_config).fingerprint()
    empty = json.loads(json.dumps(tiny_config))
    empty["lora"]["alpha_pattern"] = {}
    assert parse(TrainConfig, empty).fingerprint() == parse(TrainConfig, tiny_config).fingerprint()
