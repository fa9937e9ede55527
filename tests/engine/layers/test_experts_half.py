"""A layer with a mixture in the MLP's place: same numbers as the library's layer, whatever is kept."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from engine.config.trial import LoraConfig
from engine.kernels.experts import grouped_dense
from engine.layers.layer_spec import layer_spec, obstacle
from engine.layers.structure import ExpertsSpec, MlpSpec
from engine.quant.frozen_experts import FrozenExperts, frozen_experts
from engine.shape.policies import Policy
from tests.support.fused_layers import MIXTURES, build, run, worst

EVERYTHING = ("all-linear", "experts")


@pytest.mark.parametrize("family", MIXTURES)
def test_outputs_and_every_gradient_are_the_library_s_layers_under_every_policy(family):
    lora = LoraConfig(rank=3, target_modules=EVERYTHING)
    theirs = run(*build(family)[:2], lora, alone=True)
    for policy in (Policy.KEEP, Policy.SELECTIVE, Policy.RECOMPUTE, Policy.HOST, Policy.OFFLOAD):
        model, names, report = build(family, "fused")
        assert not report.unfused
        assert worst(run(model, names, lora, policy), theirs) < 2e-5, policy


@pytest.mark.parametrize(
    "targets", [("experts",), ("attention",), ("experts.down_proj",), ("layers.1.mlp.experts.gate_up_proj",)]
)
def test_any_subset_of_targets_has_the_library_s_gradients(targets):
    lora = LoraConfig(rank=3, target_modules=targets)
    theirs = run(*build("GptOss")[:2], lora, alone=True)
    assert worst(run(*build("GptOss", "fused")[:2], lora, Policy.RECOMPUTE), theirs) < 2e-5


def test_dropout_of_shared_experts_is_the_same_where_the_block_is_made_again():
    lora = LoraConfig(rank=3, lora_dropout=0.3)
    kept = run(*build("Qwen3_5MoeText", "fused")[:2], lora)
    assert worst(run(*build("Qwen3_5MoeText", "fused")[:2], lora, Policy.RECOMPUTE), kept) < 2e-5
    assert worst(run(*build("Qwen3_5MoeText", "fused")[:2], lora, seed=1), kept) > 1e-2


def test_experts_dequantised_for_a_pass_made_again_serve_its_gradient_too(monkeypatch):
    lora, made = LoraConfig(rank=3, target_modules=EVERYTHING), []
    theirs = run(*build("Qwen3Moe")[:2], lora, alone=True)
    original = grouped_dense.dequantized
    monkeypatch.setattr(grouped_dense, "takes", lambda x, state, room, num_choices=1: room > 0)
    monkeypatch.setattr(grouped_dense, "dequantized", lambda state, dtype: made.append(state.shape[1]) or original(state, dtype))
    for policy, count in ((Policy.KEEP, 4), (Policy.RECOMPUTE, 4)):  # the second: both forward, up again, down's gradient
        model, names, _ = build("Qwen3Moe", "fused")
        for _, experts in frozen_experts(model):
            experts.room = 2**20
        made.clear()
        assert worst(run(model, names, lora, policy), theirs) < 2e-5
        assert len(made) == count * len(list(frozen_experts(model)))


def test_the_comparison_fails_without_sinks_and_for_another_window():
    lora = LoraConfig(rank=3, target_modules=EVERYTHING)
    theirs = run(*build("GptOss")[:2], lora, alone=True)
    for changes in ({"sinks": None}, {"options": None}):
        model, names, _ = build("GptOss", "fused")
        layer = model.model.layers[0]
        half = layer.spec.attention
        if "options" in changes:
            changes = {"options": dataclasses.replace(half.options, sliding_window=None)}
        layer.spec = dataclasses.replace(layer.spec, attention=dataclasses.replace(half, **changes))
        assert worst(run(model, names, lora), theirs) > 2e-4


def test_layers_are_read_by_their_kind_and_experts_in_16_bits_stay_the_library_s():
    model, _, _ = build("Qwen3Moe")  # every second layer is a mixture
    halves = [layer_spec(layer).mlp for layer in model.model.layers]
    assert [type(half) for half in halves] == [MlpSpec, ExpertsSpec, MlpSpec]
    assert set(layer_spec(model.model.layers[1]).groups) == {"qkv", "o"}
    mixture = model.model.layers[1]
    assert obstacle(mixture) is None
    mixture.mlp.experts = torch.nn.Identity()
    assert obstacle(mixture) == "experts that are not packed in NF4 are not computed"
    assert obstacle(mixture, packs_experts=True) is None
    assert not any(isinstance(module, FrozenExperts) for module in mixture.modules())
