"""Compare layers that multiply by the frozen base in INT8 with the same layers in the working dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from engine.config.matmul import Matmul
from engine.config.trial import LoraConfig
from engine.layers import decoder_layer as fused
from engine.layers.projection_group import ProjectionGroup
from engine.layers.swap import FusedLayer, cache_weights, cached_weights, set_matmul
from engine.quant import int8_weight
from engine.quant.bnb import quantize_nf4
from engine.quant.frozen_linear import FrozenLinear
from engine.shape import compute_limits
from engine.shape.policies import Policy
from tests.support import fused_layers
from tests.support.fused_layers import batch, build, hidden_states, run, worst

LORA = LoraConfig(rank=3)
FAMILIES = ["Llama", "Qwen3", "Phi3", "Gemma2", "Granite", "Olmo3"]


@pytest.fixture(autouse=True)
def widths_of_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("hidden_size", 64), ("intermediate_size", 128)):
        monkeypatch.setitem(fused_layers.SMALL, name, value)


def quantised(family: str = "Llama", layers: str = "fused", mode: Matmul = Matmul.BF16) -> tuple[nn.Module, list[str]]:
    """Return a tiny NF4 model that multiplies in this mode, and the names of its linear layers."""
    model, names, _ = build(family, layers)
    for name in names:
        layer = model.get_submodule(name)
        layer.weight = quantize_nf4(layer.weight.data, True)
    assert set_matmul(model, mode) == []
    return model, names


def cosine(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the cosine between all gradients of two runs; the first tensor is no gradient."""
    one, other = (torch.cat([t.flatten() for t in tensors[1:]]) for tensors in (ours, theirs))
    return float(one @ other / (one.norm() * other.norm()))


@pytest.mark.parametrize("layers", ["fused", "original"])
@pytest.mark.parametrize("family", FAMILIES)
def test_int8_in_the_input_gradient_leaves_the_forward_pass_as_it_is_and_gradients_nearly(family, layers):
    plain = run(*quantised(family, layers), LORA)
    ours = run(*quantised(family, layers, Matmul.INT8_BACKWARD), LORA)
    assert torch.equal(ours[0], plain[0])
    assert 0.999 < cosine(ours, plain) < 0.9999999  # it is another product


@pytest.mark.parametrize("layers", ["fused", "original"])
@pytest.mark.parametrize("family", FAMILIES)
def test_int8_in_both_directions_stays_near(family, layers, monkeypatch):
    plain = run(*quantised(family, layers), LORA)
    ours = run(*quantised(family, layers, Matmul.INT8), LORA)
    assert 1e-4 < worst(ours[:1], plain[:1]) < 0.05 and 0.99 < cosine(ours, plain) < 0.9999999
    product = int8_weight.Int8Group.product

    def unlike(self, x, direction, *rest, **options):  # x as if its weights were not rotated
        return product(self, x.roll(1, 1) if direction == "forward" else x, direction, *rest, **options)

    monkeypatch.setattr(int8_weight.Int8Group, "product", unlike)
    assert cosine(run(*quantised(family, layers, Matmul.INT8), LORA), plain) < 0.95


@pytest.mark.parametrize("layers", ["fused", "original"])
@pytest.mark.parametrize("mode", [Matmul.INT8_BACKWARD, Matmul.INT8])
def test_an_evaluation_never_multiplies_in_int8(mode, layers):
    plain, ours = (quantised("Llama", layers, one)[0].eval() for one in (Matmul.BF16, mode))
    with torch.no_grad():
        expected = hidden_states(plain, batch())
        assert torch.equal(hidden_states(ours, batch()), expected)
        in_training = torch.equal(hidden_states(ours.train(), batch()), expected)
    assert in_training is (mode is Matmul.INT8_BACKWARD)


@pytest.mark.parametrize("mode", [Matmul.INT8_BACKWARD, Matmul.INT8])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_policy_computes_the_same(mode, dropout):
    lora = LoraConfig(rank=3, lora_dropout=dropout)
    kept = run(*quantised("Llama", mode=mode), lora)
    for policy in set(Policy) - {Policy.KEEP}:
        assert worst(run(*quantised("Llama", mode=mode), lora, policy=policy), kept) < 1e-6


@pytest.mark.parametrize(
    ("family", "dropout", "policy"),
    [("Llama", 0.0, Policy.KEEP), ("Llama", 0.3, Policy.OFFLOAD), ("Phi3", 0.0, Policy.RECOMPUTE)],
)
def test_a_product_that_adds_the_adapters_parts_has_the_same_numbers(family, dropout, policy, monkeypatch):
    lora, made, matmul = LoraConfig(rank=3, lora_dropout=dropout), [], int8_weight.int8_ops.matmul
    apart = run(*quantised(family, mode=Matmul.INT8), lora, policy)
    monkeypatch.setattr(int8_weight.int8_ops, "STEP", 16)  # so that these narrow layers lie side by side
    monkeypatch.setattr(int8_weight.int8_ops, "matmul", lambda *given: made.append(given[5]) or matmul(*given))
    together = run(*quantised(family, mode=Matmul.INT8), lora, policy)
    assert worst(together, apart) < 1e-2  # fp32 adds in another order, and that moves some codes by one
    assert any(made) is (family != "Phi3")  # one layer makes all of its parts
    monkeypatch.setattr(ProjectionGroup, "_firsts", lambda group: tuple(part.start // 2 for part in group.outputs[1:]))
    assert family == "Phi3" or worst(run(*quantised(family, mode=Matmul.INT8), lora, policy), apart) > 1e-2


@pytest.mark.parametrize("mode", [Matmul.INT8_BACKWARD, Matmul.INT8])
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
@pytest.mark.parametrize("policy", [Policy.HOST, Policy.RECOMPUTE])
def test_an_mlp_in_tiles_has_the_same_numbers_and_makes_its_codes_once(family, mode, policy, monkeypatch):
    whole = run(*quantised(family, mode=mode), LORA, policy)
    monkeypatch.setattr(compute_limits, "MLP_TILE_TOKENS", 8)
    made, unpack = [], int8_weight.int8_ops.unpack_columns
    monkeypatch.setattr(int8_weight.int8_ops, "unpack_columns", lambda *given: made.append(1) or unpack(*given))
    tiles, gradient = [], fused.mlp_gradient
    monkeypatch.setattr(fused, "mlp_gradient", lambda dy, *rest: tiles.append(len(dy)) or gradient(dy, *rest))
    tiled = run(*quantised(family, mode=mode), LORA, policy)
    assert worst(tiled, whole) < 1e-2  # fp32 rounds by the number of rows, and that moves some codes by one
    assert tiles == [8, 8, 8, 6] * 3 and len(made) == 4 * 3 - 1  # nothing below the first is trained


@pytest.mark.parametrize(("mode", "bytes_of_a_weight"), [(Matmul.INT8_BACKWARD, 4 + 1), (Matmul.INT8, 1 + 1)])
def test_codes_are_kept_within_the_weight_cache_and_give_the_same_numbers(mode, bytes_of_a_weight):
    plain = run(*quantised(mode=mode), LORA)
    model, names = quantised(mode=mode)
    numel = sum(m.in_features * m.out_features for m in map(model.get_submodule, names))
    assert cache_weights(model, torch.float32, 2**30) == bytes_of_a_weight * numel
    assert {name.partition(".")[2] for _, name in cached_weights(model)} == {
        Matmul.INT8_BACKWARD: {"", "backward"}, Matmul.INT8: {"forward", "backward"}
    }[mode]  # fmt: skip
    kept = cached_weights(model)
    assert worst(run(model, names, LORA, cached=2**30), plain) == 0.0 and cached_weights(model) == kept
    first = mode.forms[0]  # what takes longest to make
    assert cache_weights(model, torch.float32, numel) == numel
    assert {name.partition(".")[2] for _, name in cached_weights(model)} == {first}
    assert kept.items() >= cached_weights(model).items()
    assert set_matmul(model, Matmul.BF16) == [] and cache_weights(model, torch.float32, 2**30) == 4 * numel


def test_the_codes_stay_if_the_next_trial_has_the_same_mode(monkeypatch):
    model, _ = quantised(mode=Matmul.INT8)
    cache_weights(model, torch.float32, 2**30)
    kept = cached_weights(model)
    made, scales = [], int8_weight.int8_ops.weight_scales
    monkeypatch.setattr(int8_weight.int8_ops, "weight_scales", lambda *given: made.append(1) or scales(*given))
    set_matmul(model, Matmul.INT8)
    assert cached_weights(model) == kept and not made
    set_matmul(model, Matmul.INT8_BACKWARD)
    assert cached_weights(model) == {}


def test_groups_that_cannot_or_must_not_multiply_in_int8_stay_in_the_working_dtype_and_are_named():
    model, names = quantised()
    odd, exempt = "model.layers.1.self_attn.o_proj", "model.layers.2.mlp.up_proj"
    layer = model.get_submodule(odd)
    layer.weight = nn.Parameter(layer.dequantized(torch.float32), requires_grad=False)
    assert set_matmul(model, Matmul.INT8, {exempt}) == sorted([odd, exempt, exempt.replace("up", "gate")])
    groups = [set(m.int8) for m in model.modules() if isinstance(m, FusedLayer)]
    everything = {"qkv", "o", "gate_up", "down"}
    assert groups == [everything, everything - {"o"}, everything - {"gate_up"}]
    assert worst(run(model, names, LORA), run(*quantised(), LORA)) < 0.2


def test_features_that_no_rotation_divides_stay_in_the_working_dtype(monkeypatch):
    monkeypatch.setitem(fused_layers.SMALL, "intermediate_size", 96)
    model, names, _ = build("Llama", "fused")
    for name in names:
        model.get_submodule(name).weight = quantize_nf4(model.get_submodule(name).weight.data, True)
    assert set_matmul(model, Matmul.INT8) == [name for name in sorted(names) if name.endswith("down_proj")]
    assert set_matmul(model, Matmul.INT8_BACKWARD) == []


def test_a_layer_outside_fused_ones_multiplies_by_rows_of_any_shape():
    layer = FrozenLinear(nn.Linear(64, 32))
    layer.weight = quantize_nf4(layer.weight.data, True)
    x = torch.randn(2, 5, 64, requires_grad=True)
    expected = layer(x)
    (gradient,) = torch.autograd.grad(expected.sin().sum(), x)
    assert set_matmul(nn.ModuleDict({"one": layer}), Matmul.INT8) == []
    y = layer(x)
    (ours,) = torch.autograd.grad(y.sin().sum(), x)
    assert 0.0 < worst([y.detach(), ours], [expected.detach(), gradient]) < 0.03
    (of_sum,) = torch.autograd.grad(layer(x).sum(), x)
    assert worst([of_sum], [layer.dequantized(torch.float32).sum(0).expand(x.shape)]) < 0.03
    assert torch.equal(layer.eval()(x), expected)
