"""Compare fused decoder layers with the model's own, family by family: outputs and gradients."""

import weakref

import pytest
import torch
import transformers

from engine.adapter.lora import attach, trainable_parameters
from engine.config.trial import LoraConfig
from engine.errors import InputError
from engine.layers import attention
from engine.layers import decoder_layer as fused
from engine.layers.swap import FusedLayer, cache_weights, fuse_layers, require_fused, set_policy
from engine.quant.frozen_linear import freeze_linears
from engine.shape import compute_limits
from engine.shape.policies import Policy, layer_policies
from tests.support.fused_layers import FAMILIES, HYBRIDS, SMALL, batch, build, hidden_states, run, worst

TARGETS = ["all-linear", ("q_proj", "v_proj"), ("down_proj",), ("layers.1.mlp.gate_proj",), ("k_proj", "o_proj", "up_proj")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_layer_equals_the_models_own_under_every_policy(family):
    lora = LoraConfig(rank=3, use_rslora=True)
    theirs = run(*build(family)[:2], lora, alone=family in HYBRIDS)
    for policy in Policy:
        model, names, report = build(family, "fused")
        assert not report.unfused and len(report.fused) == len(model.model.layers)
        assert worst(run(model, names, lora, policy), theirs) < 2e-5, policy


@pytest.mark.parametrize("targets", TARGETS)
def test_any_subset_of_targets_has_the_same_gradients(targets):
    lora = LoraConfig(rank=3, target_modules=targets)
    theirs = run(*build("Qwen2")[:2], lora)
    assert worst(run(*build("Qwen2", "fused")[:2], lora, policy=Policy.RECOMPUTE), theirs) < 2e-5


@pytest.mark.parametrize("change", ["norm", "window", "scaling"])
def test_that_comparison_fails_for_a_wrong_layer(change):
    import dataclasses

    def with_options(half, **changes):
        return dataclasses.replace(half, options=dataclasses.replace(half.options, **changes))

    lora = LoraConfig(rank=3)
    theirs = run(*build("Mistral")[:2], lora)
    model, names, _ = build("Mistral", "fused")
    for module in model.modules():
        if isinstance(module, FusedLayer):
            mlp, half = module.spec.mlp, module.spec.attention
            wrong = {
                "norm": {"mlp": dataclasses.replace(mlp, before=dataclasses.replace(mlp.before, eps=1e-2))},
                "window": {"attention": with_options(half, sliding_window=6)},
                "scaling": {"attention": with_options(half, scaling=0.26)},
            }[change]
            module.spec = dataclasses.replace(module.spec, **wrong)
    assert worst(run(model, names, lora), theirs) > 2e-4


@pytest.mark.parametrize("family", ["Llama", "Phi3", "Olmo3", "Ministral3"])
def test_dropout_is_the_same_under_every_policy_and_another_in_the_next_step(family):
    lora = LoraConfig(rank=3, lora_dropout=0.3)
    model, names, _ = build(family, "fused")
    kept = run(model, names, lora)
    for policy in set(Policy) - {Policy.KEEP}:
        again, names, _ = build(family, "fused")
        assert worst(run(again, names, lora, policy=policy), kept) < 1e-6
    other, names, _ = build(family, "fused")
    assert worst(run(other, names, lora, seed=1), kept) > 1e-2


@pytest.mark.parametrize("family", ["Llama", "Phi3", "Granite", "Olmo3", "Glm4"])
def test_dropout_gradients_are_those_of_the_function_that_was_computed(family):
    """Compare with central differences along the gradient, through the same mask."""
    model, names, _ = build(family, "fused")
    lora = LoraConfig(rank=2, lora_dropout=0.4, target_modules=r".*(up|down|q|qkv|gate_up)_proj")
    layers = attach(model.double(), names, lora, 3)
    for layer in layers.values():
        layer.lora_a.data = layer.lora_a.data.double()
        layer.lora_b.data = torch.randn_like(layer.lora_b, dtype=torch.float64) * 0.02
    parameters = trainable_parameters(layers)
    model.train()
    row = batch()

    def loss():
        torch.manual_seed(5)
        return hidden_states(model, row).sin().sum()

    gradients = torch.autograd.grad(loss(), parameters)
    expected = sum((gradient**2).sum() for gradient in gradients)
    step = 3e-4 / expected.sqrt()  # shorter and fp32 norms show, longer and curvature does
    with torch.no_grad():
        values = []
        for sign in (1, -2):
            for parameter, gradient in zip(parameters, gradients):
                parameter += sign * step * gradient
            values.append(loss())
    measured = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(measured, expected, rtol=1e-4, atol=0)


def test_an_unknown_family_keeps_its_layers_and_strict_refuses_it():
    config = transformers.OlmoConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, attn_implementation=attention.NAME)
    model = transformers.OlmoForCausalLM(config)
    freeze_linears(model, skip=[model.get_output_embeddings()])
    report = fuse_layers(model)
    assert report.fused == () and "OlmoDecoderLayer is not of a known family" in report.describe()
    with pytest.raises(InputError, match=r"model\.layers.*strict.*0 of 3"):
        require_fused(report, "olmo")


def test_cached_weights_give_the_same_numbers_and_only_as_many_groups_as_fit(monkeypatch):
    from engine.quant.bnb import quantize_nf4
    from engine.quant.frozen_linear import FrozenLinear

    def quantised():
        model, names, _ = build("Llama", "fused")
        for name in names:
            layer = model.get_submodule(name)
            layer.weight = quantize_nf4(layer.weight.data, True)
        return model, names

    lora = LoraConfig(rank=3)
    plain = run(*quantised(), lora)
    model, names = quantised()
    everything = cache_weights(model, torch.float32, 2**30)
    assert everything == 4 * sum(m.in_features * m.out_features for m in map(model.get_submodule, names))
    assert cache_weights(model, torch.float32, everything // 3) == everything // 3
    assert cache_weights(model, torch.float32, 0) == 0
    used = set()
    dequantized = FrozenLinear.dequantized
    monkeypatch.setattr(FrozenLinear, "dequantized", lambda self, *a, **k: used.add(self) or dequantized(self, *a, **k))
    for budget, num_dequantized in ((2**30, 0), (everything // 3, 14)):
        model, names = quantised()
        cache_weights(model, torch.float32, budget)
        used.clear()
        assert worst(run(model, names, lora, cached=budget), plain) < 1e-6 and len(used) == num_dequantized


def test_the_last_layers_keep_their_activations_whatever_the_policy_and_some_others_do_on_the_host():
    model, _, _ = build("Llama", "fused")
    set_policy(model, Policy.OFFLOAD, keep_layers=1, host_layers=1)
    assert [m.policy for m in model.modules() if isinstance(m, FusedLayer)] == [Policy.HOST, Policy.OFFLOAD, Policy.KEEP]
    spread = layer_policies(8, Policy.RECOMPUTE, keep_layers=1, host_layers=3)
    assert [i for i, policy in enumerate(spread) if policy == "host"] == [0, 3, 5]
    assert layer_policies(3, Policy.RECOMPUTE, keep_layers=5, host_layers=9) == ["keep"] * 3
    assert layer_policies(3, Policy.RECOMPUTE, keep_layers=0, host_layers=9) == ["host"] * 3


@pytest.mark.parametrize("policy", [Policy.HOST, Policy.SELECTIVE, Policy.RECOMPUTE, Policy.OFFLOAD])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Granite", "Olmo3", "Phi3"])
def test_an_mlp_in_tiles_has_the_same_numbers(family, policy, monkeypatch):
    """In fp64 matmuls, because fp32 rounds by the number of rows on some CPUs."""
    lora = LoraConfig(rank=3)
    whole = run(*build(family, "fused", torch.float64)[:2], lora, policy)
    monkeypatch.setattr(compute_limits, "MLP_TILE_TOKENS", 8)  # 30 tokens: three tiles and a part
    tiles = []
    gradient = fused.mlp_gradient
    monkeypatch.setattr(fused, "mlp_gradient", lambda dy, *rest: tiles.append(len(dy)) or gradient(dy, *rest))
    assert worst(run(*build(family, "fused", torch.float64)[:2], lora, policy), whole) < 1e-6
    assert tiles == [8, 8, 8, 6] * 3


def test_dropout_in_tiles_is_the_same_under_every_policy(monkeypatch):
    monkeypatch.setattr(compute_limits, "MLP_TILE_TOKENS", 8)
    lora = LoraConfig(rank=3, lora_dropout=0.3)
    one, two = (run(*build("Llama", "fused")[:2], lora, policy) for policy in (Policy.RECOMPUTE, Policy.OFFLOAD))
    assert worst(one, two) < 1e-6


@pytest.mark.parametrize("policy", [Policy.KEEP, Policy.HOST])
def test_nothing_of_attention_outlives_a_backward_pass_that_never_reaches_it(policy, monkeypatch):
    """Below the first adapter's MLP nothing trains, so attention there has no backward pass."""
    outputs = []
    attention_of_one = attention.F.scaled_dot_product_attention

    def noted(*arguments, **options):
        out = attention_of_one(*arguments, **options)
        outputs.append(weakref.ref(out.untyped_storage()))
        return out

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", noted)
    run(*build("Llama", "fused")[:2], LoraConfig(rank=3, target_modules=("up_proj",)), policy)
    assert len(outputs) >= 3 and not any(out() is not None for out in outputs)
