"""Adapters on experts: PEFT's names and layout, and losses that PEFT repeats."""

from __future__ import annotations

import pytest
import torch

from engine.adapter.expert_lora import LoraExperts, stored_path
from engine.adapter.flat import FlatAdapter
from engine.adapter.lora import attach
from engine.config.targets import resolve_targets
from engine.config.trial import LoraConfig
from engine.errors import InputError
from engine.model.library_layers import Storages
from tests.support.fused_layers import batch, build, hidden_states
from tests.support.model_families import peft_difference

UP, DOWN = (f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.shared_expert.down_proj", UP, DOWN]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_peft_repeats_the_losses_of_attention_and_experts_adapters(model_type, tmp_path):
    assert peft_difference(model_type, tmp_path) < 1e-4


def test_targets_are_named_by_group():
    assert resolve_targets(NAMES, "all-linear") == NAMES[:2]
    assert resolve_targets(NAMES, "attention") == NAMES[:1]
    assert resolve_targets(NAMES, ("experts",)) == NAMES[2:]
    assert resolve_targets(NAMES, ("all-linear", "experts")) == NAMES
    assert resolve_targets(NAMES, ("experts.down_proj",)) == [DOWN]
    with pytest.raises(InputError, match="this model has no experts that an adapter could be put on"):
        resolve_targets(NAMES[:2], ("experts",))


def test_two_weights_of_one_module_nest_as_in_peft():
    both = {UP, DOWN}
    assert stored_path(UP, both) == "model.layers.0.mlp.experts.base_layer"
    assert stored_path(DOWN, both) == stored_path(DOWN, {DOWN}) == stored_path(UP, {UP}) == "model.layers.0.mlp.experts"
    assert stored_path(NAMES[0], both) == NAMES[0]


def test_dropout_with_experts_is_refused_because_peft_has_none_there():
    config = LoraConfig(lora_dropout=0.1, target_modules=("experts",))
    with pytest.raises(InputError, match=r"lora.lora_dropout = 0.1: must be 0 with adapters on experts .*PEFT"):
        attach(torch.nn.Module(), NAMES, config, seed=0)


def test_while_an_adapter_becomes_flat_it_takes_no_more_memory_than_values_and_gradient():
    with torch.device("meta"):
        experts = torch.nn.Module()
        experts.is_transposed, experts.shapes = False, {"gate_up_proj": (16, 256, 128)}
        experts.gate_up_proj = torch.empty(0)
    with Storages() as storages:
        layer = LoraExperts(experts, "gate_up_proj", LoraConfig(rank=8), torch.Generator().manual_seed(0), 0, 8)
        adapter = FlatAdapter({"experts": layer}, torch.bfloat16)
        assert adapter.parameter.grad is adapter.memory.gradient and layer.lora_b.grad is not None
        assert storages.highest <= 2.01 * 4 * adapter.parameter.numel()


def test_a_flat_adapter_copies_all_but_experts_and_its_scaling_reaches_them():
    model, names, _ = build("GptOss", "fused")
    layers = attach(model, names, LoraConfig(rank=2, target_modules=("all-linear", "experts")), 0)
    torch.manual_seed(0)
    for layer in layers.values():
        layer.lora_b.data.normal_(0, 0.2)
    before = hidden_states(model, batch())
    adapter = FlatAdapter(layers, torch.float32)
    linears = [layer for layer in layers.values() if not isinstance(layer, LoraExperts)]
    assert adapter.memory.cast.numel() == sum(p.numel() for layer in linears for p in layer.parameters_of())
    assert adapter.parameter.numel() > 2 * adapter.memory.cast.numel()
    torch.testing.assert_close(hidden_states(model, batch()), before)
    hidden_states(model, batch()).square().sum().backward()
    assert all(layer.lora_b.grad.any() for layer in layers.values())
    adapter.memory.scalings.mul_(2)  # as the next trial's does, which a recording must read
    adapter.refresh()
    changed = hidden_states(model, batch())
    for layer in layers.values():
        layer.lora_b.data.mul_(2)
    adapter.memory.scalings.div_(2)
    adapter.refresh()
    torch.testing.assert_close(hidden_states(model, batch()), changed)
    assert (changed - before).abs().max() > 1e-2
