"""Experts in NF4 compute what the library's own experts do with the same weights, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch

from engine.adapter.expert_lora import LoraExperts
from engine.config.trial import LoraConfig
from engine.model.comparison import library_losses, random_samples
from engine.model.pretrained import model_factory
from engine.model.skeleton import VOCABULARY, build
from engine.quant.bnb import quantize_nf4
from engine.quant.frozen_experts import DOWN, UP, FrozenExperts, packable, packable_experts
from tests.support.model_families import MIXTURE_OF_GEMMA4, config_of

TOKENS, CHOICES, RANK = 19, 2, 3


def library_experts(model_type):
    config = config_of(model_type, **(MIXTURE_OF_GEMMA4 if model_type == "gemma4_text" else {}))
    factory = model_factory(config)
    sample = random_samples(VOCABULARY)[0]
    model = build(config, lambda small: factory.from_config(small), lambda made: library_losses(made, sample))
    return next(iter(packable_experts(model).values()))


def packed(library, double=True):
    """Return packed experts, and the library's with the values of the packed ones."""
    ours, same = FrozenExperts.of(library, double), copy.deepcopy(library)
    for name, (number, *_) in ours.shapes.items():
        rows = [ours.dequantized(name, expert, torch.float32) for expert in range(number)]
        getattr(same, name).data.copy_(torch.stack(rows))
    return ours, same


def delta(layer, is_transposed):
    """Return what PEFT adds to the library's parameter (`ParamWrapper.get_delta_weight`)."""
    a = layer.lora_a.reshape(layer.num_experts, -1, layer.in_features)
    b = layer.lora_b.reshape(layer.out_features, -1, layer.num_experts)
    return torch.einsum("ore,eri->eio" if is_transposed else "ore,eri->eoi", b, a) * layer.scaling


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "olmoe", "gpt_oss", "qwen3_5_moe_text", "gemma4_text"])
@pytest.mark.parametrize("targets", [(UP, DOWN), (DOWN,), ()])
def test_losses_and_every_gradient_are_those_of_the_library_s_own_experts(model_type, targets):
    torch.manual_seed(0)
    ours, same = packed(library_experts(model_type))
    number, width = ours.num_experts, ours.shapes[UP][2]
    layers = {n: LoraExperts(ours, n, LoraConfig(rank=RANK), torch.Generator().manual_seed(1), 0, RANK) for n in targets}
    for layer in layers.values():
        layer.lora_b.data.normal_(std=0.2)
    x, weights = torch.randn(TOKENS, width), torch.rand(TOKENS, CHOICES)
    chosen = torch.stack([torch.randperm(number)[:CHOICES] for _ in range(TOKENS)])
    chosen[chosen == number - 1] = 0  # one expert is never hit
    ours.adapters, ours.is_library = dict(layers), False
    trained = [p for layer in layers.values() for p in (layer.lora_a, layer.lora_b)]

    def gradients(compute):
        inputs = [t.clone().requires_grad_() for t in (x, weights)]
        y = compute(inputs[0], chosen, inputs[1])
        return y.detach(), torch.autograd.grad((y * torch.cos(torch.arange(width))).sum(), [*inputs, *trained])

    def with_deltas(*inputs):
        changed = {n: getattr(same, n).detach() + delta(layer, same.is_transposed) for n, layer in layers.items()}
        return torch.func.functional_call(same, changed, inputs)

    (y, found), (expected, wanted) = gradients(ours), gradients(with_deltas)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(found, wanted):
        assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    if layers:
        layers[DOWN].scaling *= 2  # twin: another adapter changes losses and gradients
        assert (gradients(ours)[0] - expected).abs().max() > 1e-2


def test_before_the_switch_the_library_s_own_code_computes_bit_for_bit():
    ours, same = packed(library_experts("olmoe"))
    same.config._experts_implementation = "eager"
    x, weights = torch.randn(5, ours.shapes[UP][2]), torch.rand(5, 1)
    chosen = torch.tensor([[0], [1], [1], [3], [2]])
    assert torch.equal(ours(x, chosen, weights), same(x, chosen, weights))


@pytest.mark.parametrize("double", [True, False])
def test_the_weights_are_those_of_bitsandbytes_own_nf4_and_no_further_from_16_bits(double):
    from bitsandbytes.functional import dequantize_4bit

    library = library_experts("qwen3_moe")
    ours = FrozenExperts.of(library, double)
    for name, (number, *_) in ours.shapes.items():
        weight = getattr(library, name).detach()
        theirs = quantize_nf4(weight.reshape(-1, 64).clone(), double)
        expected = dequantize_4bit(theirs.data, theirs.quant_state).view_as(weight)
        found = torch.stack([ours.dequantized(name, i, torch.float32) for i in range(number)])
        assert (found - expected).abs().max() <= 4e-7 * expected.abs().max()  # its CPU code rounds once less
        error, theirs_error = ((one - weight).pow(2).mean().sqrt() for one in (found, expected))
        assert error <= theirs_error * (1 + 1e-6)
        assert getattr(ours, name).numel() < 0.6 * getattr(library, name).numel() + 1200


def test_a_token_that_skips_its_experts_gets_zeros():
    ours, _ = packed(library_experts("qwen3_moe"))
    ours.is_library = False
    chosen = torch.tensor([[0, 1], [ours.num_experts, ours.num_experts]])
    y = ours(torch.randn(2, ours.shapes[UP][2]), chosen, torch.ones(2, 2))
    assert y[0].abs().sum() > 0 and y[1].abs().sum() == 0


def test_experts_of_another_form_are_not_packed():
    library = library_experts("qwen3_moe")
    assert packable(library)
    library.has_post_expert_norm = True
    assert not packable(library)
