"""A layer with the library's own token mixer: same numbers, samples apart, nothing of it kept in host memory."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5 as library

from engine.config.trial import LoraConfig
from engine.layers.attention import Documents
from engine.layers.layer_spec import layer_spec, obstacle
from engine.layers.library.library_kernels import calls_kernels, replace_failing_kernels, use_torch_functions
from engine.layers.library.library_mixer import LibraryMixer, Way
from engine.layers.structure import MixerSpec
from engine.quant.bnb import quantize_nf4
from engine.shape import compute_limits
from engine.shape.policies import Policy
from tests.support.fused_layers import batch, build, hidden_states, run, worst
from tests.support.mixers import ORIGINAL_CONV, ORIGINAL_RULE, deaf, told_conv, told_rule

HYBRID = "Qwen3_5Text"
MIXERS = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
TARGETS = [
    ("in_proj_qkv",), ("in_proj_z", "out_proj"), ("in_proj_a", "in_proj_b"), ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("gate_proj", "up_proj", "down_proj"), ("layers.2.linear_attn.out_proj",), ("layers.1.self_attn.o_proj",), MIXERS,
]  # fmt: skip


@pytest.mark.parametrize("targets", TARGETS, ids=lambda names: names[0])
def test_any_subset_of_targets_has_the_library_s_gradients(targets):
    lora = LoraConfig(rank=3, target_modules=targets)
    theirs = run(*build(HYBRID)[:2], lora, alone=True)
    for policy in (Policy.HOST, Policy.RECOMPUTE):
        assert worst(run(*build(HYBRID, "fused")[:2], lora, policy), theirs) < 2e-5, policy


def quantised(layers: str):
    model, names, _ = build(HYBRID, layers)
    for name in names:
        layer = model.get_submodule(name)
        layer.weight = quantize_nf4(layer.weight.data, True)
    return model, names


def test_packed_weights_have_the_library_s_gradients_cached_or_not():
    lora = LoraConfig(rank=3)
    theirs = run(*quantised("original"), lora, alone=True)
    for cached in (0, 2**20):
        assert worst(run(*quantised("fused"), lora, Policy.OFFLOAD, cached=cached), theirs) < 2e-5


def test_dropout_is_the_same_under_every_policy_and_another_in_the_next_step():
    lora = LoraConfig(rank=3, lora_dropout=0.3)
    kept = run(*build(HYBRID, "fused")[:2], lora)
    for policy in (Policy.RECOMPUTE, Policy.HOST):
        assert worst(run(*build(HYBRID, "fused")[:2], lora, policy), kept) < 2e-5
    assert worst(run(*build(HYBRID, "fused")[:2], lora, seed=1), kept) > 1e-2


@pytest.mark.parametrize("policy", [Policy.KEEP, Policy.HOST, Policy.OFFLOAD])
def test_the_mlp_of_such_a_layer_runs_in_tiles(policy, monkeypatch):
    lora = LoraConfig(rank=3)
    whole = run(*build(HYBRID, "fused")[:2], lora, policy)
    monkeypatch.setattr(compute_limits, "MLP_TILE_TOKENS", 8)
    assert worst(run(*build(HYBRID, "fused")[:2], lora, policy), whole) < 2e-5


def test_the_comparison_fails_for_norms_without_their_offset():
    lora = LoraConfig(rank=3)
    theirs = run(*build(HYBRID)[:2], lora, alone=True)
    model, names, _ = build(HYBRID, "fused")
    layer = model.model.layers[1]
    half = layer.spec.attention
    norm = dataclasses.replace(half.q_norm, offset=0.0)
    layer.spec = dataclasses.replace(layer.spec, attention=dataclasses.replace(half, q_norm=norm))
    assert worst(run(model, names, lora), theirs) > 2e-4


def test_layers_are_read_by_their_kind():
    model, _, _ = build(HYBRID)
    halves = [layer_spec(layer).attention for layer in model.model.layers]
    assert [isinstance(half, MixerSpec) for half in halves] == [True, False, True]
    assert halves[1].output_gate and halves[1].features == (128, 32, 32) and halves[1].q_norm.offset == 1.0
    groups = [set(layer_spec(layer).groups) for layer in model.model.layers[:2]]
    assert groups == [{"gate_up", "down"}, {"qkv", "o", "gate_up", "down"}]
    del model.model.layers[0].mlp.gate_proj
    assert obstacle(model.model.layers[0]) == "Qwen3_5DecoderLayer has no mlp.gate_proj"


# --- samples apart ----------------------------------------------------------------------------------------------------


INSTALLED = {
    "both packages": (told_rule, told_conv, Way.OFFSETS),
    "flash-linear-attention": (told_rule, None, Way.GAPS),
    "neither": (None, None, Way.ALONE),
    "a library that runs on": (deaf(ORIGINAL_RULE), deaf(ORIGINAL_CONV), Way.ALONE),
    "a state that runs on": (deaf(ORIGINAL_RULE), told_conv, Way.ALONE),
}


@pytest.mark.parametrize("packages", INSTALLED)
def test_samples_are_kept_apart_by_what_the_library_can_do(packages, monkeypatch):
    lora = LoraConfig(rank=3)
    theirs = run(*build(HYBRID)[:2], lora, alone=True)
    rule, conv, way = INSTALLED[packages]
    if rule is not None:
        monkeypatch.setattr(library, "torch_chunk_gated_delta_rule", rule)
    if conv is not None:
        monkeypatch.setattr(library, "causal_conv1d_fn", conv)
    for policy in (Policy.KEEP, Policy.RECOMPUTE):
        model, names, _ = build(HYBRID, "fused")
        assert worst(run(model, names, lora, policy), theirs) < 2e-5
        assert {layer.mixer.way for layer in model.model.layers if layer.mixer} == {way}


def test_a_row_of_one_sample_says_nothing_about_the_way():
    model, _, _ = build(HYBRID, "fused")
    with torch.no_grad():
        hidden_states(model, batch((9,)))
        assert model.model.layers[0].mixer.way is None
        hidden_states(model, batch((9, 1)))
        assert model.model.layers[0].mixer.way is Way.ALONE


def test_samples_of_one_length_are_a_batch():
    model, _, _ = build(HYBRID, "fused")
    row, calls = batch((7, 7, 7)), []
    for layer in model.model.layers[::2]:
        layer.mixer.module.register_forward_pre_hook(lambda _, given: calls.append(given[0].shape))
    with torch.no_grad():
        ours = hidden_states(model, row)
        assert calls == [(3, 7, 48)] * 2 and model.model.layers[0].mixer.way is None
        torch.testing.assert_close(ours, hidden_states(build(HYBRID)[0], row, alone=True), rtol=1e-4, atol=1e-5)


def test_a_state_that_decays_fast_does_not_pass_for_one_that_is_cut():
    model, _, _ = build(HYBRID)
    module = model.model.layers[0].linear_attn
    module.A_log.fill_(2.0)  # 1e-5 of the state is left after one token
    mixer = LibraryMixer(module)
    x, documents = torch.randn(20, 48), Documents((10, 10), torch.tensor([0, 10, 20], dtype=torch.int32))
    mixer._with_offsets = lambda x, two: mixer._call(x)
    mixer._with_gaps = lambda x, two: mixer._call(x)
    assert mixer._choose(x, documents) is Way.ALONE


def test_the_tiny_model_is_computed_on_the_cpu_whatever_is_installed(monkeypatch):
    """With its packages installed, transformers calls their CUDA kernels for tensors on the CPU, too."""
    model, _, _ = build(HYBRID)
    right = hidden_states(model, batch((9,)))

    def decorate(function):
        is_new_implementation = True

        def kernel(*_, **__):
            raise RuntimeError(f"no CUDA device: {is_new_implementation}")

        kernel.__wrapped__ = function
        return kernel

    monkeypatch.setattr(library, "torch_chunk_gated_delta_rule", decorate(ORIGINAL_RULE))
    other, _, _ = build(HYBRID)
    torch.testing.assert_close(hidden_states(other, batch((9,))), right)
    for module in other.modules():
        module.__dict__.pop("forward", None)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        hidden_states(other, batch((9,)))
    use_torch_functions(other)
    torch.testing.assert_close(hidden_states(other, batch((9,))), right)


class RefusedInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("this card is not supported")


@pytest.mark.parametrize("refuses", [True, False])
def test_kernels_that_raise_in_the_backward_pass_give_way_with_a_warning(refuses, monkeypatch):
    def decorate(function):
        is_new_implementation = True

        def kernel(query, *others, **named):
            assert is_new_implementation
            return function(RefusedInBackward.apply(query) if refuses else query, *others, **named)

        kernel.__wrapped__ = function
        return kernel

    monkeypatch.setattr(library, "torch_chunk_gated_delta_rule", decorate(ORIGINAL_RULE))
    model, names, _ = build(HYBRID, "fused")
    for module in model.modules():
        module.__dict__.pop("forward", None)
    if not refuses:  # twin: kernels that work stay
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            replace_failing_kernels(model, torch.float32, torch.device("cpu"))
        return
    with pytest.raises(RuntimeError, match="not supported"):
        run(model, names, LoraConfig(rank=3))
    model, names, _ = build(HYBRID, "fused")
    for module in model.modules():
        module.__dict__.pop("forward", None)
    with pytest.warns(UserWarning, match="GatedDeltaNet is computed by torch operations.*this card is not supported"):
        replace_failing_kernels(model, torch.float32, torch.device("cpu"))
    run(model, names, LoraConfig(rank=3))


def test_kernels_stay_where_the_probe_does_not_suit_the_module(monkeypatch):
    def decorate(function):
        is_new_implementation = True
        kernel = lambda *args, **named: function(*args, **named) if is_new_implementation else None  # noqa: E731
        kernel.__wrapped__ = lambda *_, **__: 1 / 0
        return kernel

    monkeypatch.setattr(library, "torch_chunk_gated_delta_rule", decorate(ORIGINAL_RULE))
    model, names, _ = build(HYBRID, "fused")
    for module in model.modules():
        module.__dict__.pop("forward", None)
    with monkeypatch.context() as patch:
        patch.setattr(library.Qwen3_5RMSNormGated, "forward", lambda *_: 1 / 0)
        replace_failing_kernels(model, torch.float32, torch.device("cpu"))
    run(model, names, LoraConfig(rank=3))  # with torch's functions it would divide by zero


@pytest.mark.parametrize("is_new_implementation", [True, False])
def test_whether_kernels_compute_a_mixer_is_known(is_new_implementation, monkeypatch):
    package = "fla"
    kernel = lambda *_, **__: (is_new_implementation, package)  # noqa: E731
    kernel.__wrapped__ = ORIGINAL_RULE
    monkeypatch.setattr(library, "torch_chunk_gated_delta_rule", kernel)
    model, _, _ = build(HYBRID, "fused")
    assert not calls_kernels(model, package)  # `build` takes torch's functions
    for module in model.modules():
        module.__dict__.pop("forward", None)
    assert calls_kernels(model, package) is is_new_implementation and not calls_kernels(model, "causal_conv1d")


def test_under_the_host_policy_the_mixer_s_graph_stays_out_of_the_stash():
    """It may hold the library's own tensors, which would be lost while they are on the host."""
    model, names, _ = build(HYBRID, "fused")
    weights = [p.clone() for p in model.parameters()]
    run(model, names, LoraConfig(rank=3), Policy.HOST)
    assert all(torch.equal(a, b) for a, b in zip(weights, (p for n, p in model.named_parameters() if "lora" not in n)))
