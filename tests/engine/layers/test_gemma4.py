"""Gemma 4's layers: keys and values shared between layers, k = v, per-layer inputs, the layer's scalar.

Comparisons run in fp64, where ours and the library's differ by rounding of 1e-16 alone.
"""

import dataclasses

import pytest
import torch

from engine.config.trial import LoraConfig
from engine.kernels import ops, reference
from engine.layers import decoder_layer as fused
from engine.layers.layer_spec import decoder_norm, layer_spec, obstacle
from engine.layers.structure import TailSpec
from engine.layers.swap import FusedLayer, FusedNorm, fuse_layers
from engine.quant.bnb import quantize_nf4
from engine.shape import compute_limits
from engine.shape.policies import Policy
from tests.support import fused_layers
from tests.support.fused_layers import batch, build, hidden_states, run, worst

SMALL_E, LARGE = "Gemma4Text", "Gemma4Text with k = v"
TARGETS = [("per_layer_model_projection",), ("k_proj",), ("layers.0.self_attn.v_proj",), ("layers.1.mlp.up_proj",),
           ("per_layer_input_gate", "v_proj"), ("per_layer_projection", "o_proj"), ("layers.3.self_attn.q_proj",)]  # fmt: skip


@pytest.fixture
def in_double(monkeypatch):
    """Make `run` compute in fp64: the model, the adapters, and what the kernels' definition does in fp32."""
    set_policy, as_float = fused_layers.set_policy, torch.Tensor.float

    def doubled(model, *others):
        model.double()
        for module in model.modules():
            if isinstance(module, FusedLayer):
                module.spec = layer_spec(module.replaced[0].double())
            elif isinstance(module, FusedNorm):
                module.spec = decoder_norm(module.replaced[0], model.model.layers[0].replaced[0])
        return set_policy(model, *others)

    def to_float(x, *args, **keywords):
        return x.double() if x.is_floating_point() else as_float(x, *args, **keywords)

    monkeypatch.setattr(fused_layers, "set_policy", doubled)
    monkeypatch.setattr(torch.Tensor, "float", to_float)
    monkeypatch.setattr(ops, "rms_norm_backward", reference.rms_norm_backward)


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("family", [SMALL_E, LARGE])
def test_losses_and_gradients_are_the_librarys_under_every_policy(family):
    lora = LoraConfig(rank=3)
    theirs = run(*build(family)[:2], lora)
    for policy in Policy:
        model, names, report = build(family, "fused")
        assert not report.unfused and worst(run(model, names, lora, policy), theirs) < 1e-10, policy


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("targets", TARGETS)
def test_any_targets_have_the_librarys_gradients(targets):
    lora = LoraConfig(rank=3, target_modules=targets)
    theirs = run(*build(SMALL_E)[:2], lora)
    for policy in (Policy.KEEP, Policy.RECOMPUTE):
        assert worst(run(*build(SMALL_E, "fused")[:2], lora, policy), theirs) < 1e-10


@pytest.mark.usefixtures("in_double")
def test_layers_in_tiles_are_the_same(monkeypatch):
    lora = LoraConfig(rank=3)
    theirs = run(*build(SMALL_E)[:2], lora)
    monkeypatch.setattr(compute_limits, "MLP_TILE_TOKENS", 7)
    for policy in (Policy.SELECTIVE, Policy.HOST):
        assert worst(run(*build(SMALL_E, "fused")[:2], lora, policy), theirs) < 1e-10


def changed(model, **changes):
    for module in model.modules():
        if isinstance(module, FusedLayer):
            module.spec = dataclasses.replace(module.spec, **{k: change(module.spec) for k, change in changes.items()})


WRONG = {
    "no scalar": (SMALL_E, {"tail": lambda spec: dataclasses.replace(spec.tail, scalar=None)}),
    "no per-layer input": (SMALL_E, {"tail": lambda spec: TailSpec(scalar=spec.tail.scalar)}),
    "values not normalised": (SMALL_E, {"attention": lambda spec: dataclasses.replace(spec.attention, v_norm=None)}),
    "values normalised as keys": (
        LARGE, {"attention": lambda spec: dataclasses.replace(spec.attention, v_norm=spec.attention.k_norm)}),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_layer_shows(fault):
    family, changes = WRONG[fault]
    with torch.no_grad():
        theirs = hidden_states(build(family)[0], batch())
        model = build(family, "fused")[0]
        assert worst([hidden_states(model, batch())], [theirs]) < 1e-5
        changed(model, **changes)
        if fault == "no per-layer input":
            changed(model, groups=lambda spec: {k: v for k, v in spec.groups.items() if not k.startswith("input")})
        assert worst([hidden_states(model, batch())], [theirs]) > 1e-3


def test_gradients_that_do_not_cross_layers_show(monkeypatch):
    lora, gradient = LoraConfig(rank=3, target_modules=("layers.0.self_attn.v_proj",)), fused.attention_gradient
    theirs = run(*build(SMALL_E)[:2], lora)
    assert worst(run(*build(SMALL_E, "fused")[:2], lora), theirs) < 2e-5
    monkeypatch.setattr(fused, "attention_gradient", lambda *args: gradient(*args[:5]))
    assert worst(run(*build(SMALL_E, "fused")[:2], lora), theirs) > 1e-2


@pytest.mark.parametrize("unfused", [0, 2])
def test_layers_of_the_library_and_ours_read_each_others_keys(unfused):
    """Layer 0 stores what layer 2 reads."""
    lora = LoraConfig(rank=3)
    theirs = run(*build(SMALL_E)[:2], lora)
    model, names, _ = build(SMALL_E, "fused")
    model.model.layers[unfused] = model.model.layers[unfused].replaced[0]
    assert worst(run(model, names, lora), theirs) < 2e-5


def test_packed_weights_have_the_gradients_of_unfused_layers():
    lora, results = LoraConfig(rank=3), []
    for layers in ("original", "fused"):
        model, names, _ = build(SMALL_E, layers)
        for name in names:
            module = model.get_submodule(name)
            module.weight = quantize_nf4(module.weight.data, True)
        results.append(run(model, names, lora, Policy.SELECTIVE))
    assert worst(results[1], results[0]) < 2e-5


def test_dropout_is_the_same_under_every_policy():
    lora = LoraConfig(rank=3, lora_dropout=0.3)
    kept = run(*build(SMALL_E, "fused")[:2], lora)
    for policy in Policy:
        assert worst(run(*build(SMALL_E, "fused")[:2], lora, policy), kept) < 1e-5, policy


def test_shared_keys_stay_on_the_device_while_others_read_them():
    model, names, _ = build(SMALL_E, "fused")
    seen = {}
    push = model.model.layers[0].stash.push.__func__

    class Noting(type(model.model.layers[0].stash)):
        def push(self, x, kept=(), stays=()):
            number = push(self, x, kept, stays)
            seen[number] = ({s._cdata for s, _ in self._entries[-1].storages}, {t.untyped_storage()._cdata for t in stays})
            return number

    for layer in model.model.layers:
        layer.policy, layer.stash = Policy.HOST, Noting()
    layers = fused_layers.attach(model, names, LoraConfig(rank=3), 0)
    hidden_states(model.train(), batch()).square().sum().backward()
    assert layers and all(stays and not stored & stays for stored, stays in seen.values())


def test_experts_and_attention_that_is_not_causal_run_unfused():
    layer = build(SMALL_E)[0].model.layers[0]
    assert obstacle(layer) is None
    layer.enable_moe_block = True
    assert obstacle(layer) == "Gemma4TextDecoderLayer with enable_moe_block is not computed"
    layer.enable_moe_block, layer.self_attn.is_causal = False, False
    assert obstacle(layer) == "attention that is not causal is not computed"


def test_a_head_wider_than_the_kernels_take_runs_unfused():
    model, _, _ = build(LARGE)
    model.model.layers[0].self_attn.head_dim = 513
    assert obstacle(model.model.layers[0]) == "attention over heads of more than 512 features has no kernel"
    assert len(fuse_layers(model).unfused) == 1
