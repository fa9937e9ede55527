"""The descriptions of families hold for the library's own models: shapes, parameters, defaults, plans."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.config.trial import TrainConfig
from engine.errors import InputError
from engine.layers.swap import cache_weights, fuse_layers, survey
from engine.quant.bnb import quantize_nf4
from engine.shape.families import FAMILIES, OTHER_TYPES
from engine.shape.layer_plan import adapted_outside, adapted_projections, base_bytes, can_record, num_trained, plan_layers
from engine.shape.model_shape import ModelShape
from tests.support import fused_layers
from tests.support.fused_layers import build
from tests.support.published_models import LLAMA_8B

NUMBERS = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 64}
CODES = 1536  # the two code tables of a weight, as the allocator rounds them


def transformers_config(family: str, **given: Any) -> dict[str, Any]:
    """Return what transformers makes of a config.json with these values alone."""
    from transformers import CONFIG_MAPPING

    kind = f"{family}_text" if OTHER_TYPES.get(f"{family}_text") == family else family
    return CONFIG_MAPPING[kind](**given).to_dict()


@pytest.mark.parametrize("family", fused_layers.FAMILIES)
def test_a_shape_counts_every_layer_and_parameter_of_the_library_s_model(family):
    model, _, _ = build(family)
    shape = ModelShape.of(model.config.to_dict(), family)
    assert shape.family != "other"
    for layer, one in zip(model.model.layers, shape.each, strict=True):
        linears = {
            n.rpartition(".")[2]: (m.out_features, m.in_features) for n, m in layer.named_modules() if hasattr(m, "in_features")
        }
        assert linears == one.projections()
    linear = sum(m.weight.numel() for m in model.model.modules() if hasattr(m, "in_features"))
    assert linear == shape.all_linear_parameters
    vectors = sum(p.numel() for n, p in model.model.named_parameters() if p.dim() == 1 or "conv1d" in n)
    assert vectors == shape.vector_parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_means_what_transformers_takes_it_for(family):
    """But for the numbers above, which every config.json of a released model has."""
    filled = transformers_config(family, **NUMBERS)
    shape = ModelShape.known({"model_type": family, **NUMBERS}, "x")
    assert shape is not None and shape == ModelShape.known({**filled, "model_type": family}, "x")
    for key, value in FAMILIES[family].defaults.items():
        assert transformers_config(family)[key] == value, key


@pytest.mark.parametrize("family", fused_layers.FAMILIES)
def test_a_shape_and_a_survey_agree_on_what_runs_fused(family):
    model, _, _ = build(family)
    config, keys = model.config, FAMILIES[ModelShape.of(model.config.to_dict(), family).family].no_dropout
    for key, value in [*((key, 0.1) for key in keys), ("hidden_act", "relu")]:
        name = "hidden_activation" if key == "hidden_act" and hasattr(config, "hidden_activation") else key
        before = getattr(config, name)
        setattr(config, name, value)
        shape = ModelShape.known(config.to_dict(), family)
        assert not survey(model).fused and (shape is None or shape.family == "other"), key
        setattr(config, name, before)
    assert survey(model).fused and ModelShape.of(config.to_dict(), family).family != "other"


def test_a_layer_without_the_norms_that_its_description_needs_runs_unfused(monkeypatch):
    monkeypatch.setitem(fused_layers.FAMILIES, "HyperCLOVAX", {"use_post_norm": False})
    model, _, _ = build("HyperCLOVAX")
    assert "has no post_norm1.weight, post_norm2.weight" in survey(model).describe()
    assert ModelShape.of(model.config.to_dict(), "x").family == "other"


@pytest.mark.parametrize("family", ["Llama", *fused_layers.HYBRIDS])
@pytest.mark.parametrize("packed", [True, False], ids=["nf4", "16 bits"])
def test_the_bytes_of_a_base_are_those_of_the_model_s_tensors(family, packed):
    model, names, _ = build(family, dtype=torch.bfloat16)
    shape, linear = ModelShape.of(model.config.to_dict(), family), 0
    for name in names:
        weight = model.get_submodule(name).weight
        packed_weight = quantize_nf4(weight.data, True) if packed else weight
        state = getattr(packed_weight, "quant_state", None)
        linear += packed_weight.nbytes + (0 if state is None else state.absmax.nbytes + state.state2.absmax.nbytes + CODES)
    others = sum(p.nbytes for n, p in model.model.named_parameters() if p.dim() == 1 or "conv1d" in n)
    config = plan_config()
    values = {"quantization": "nf4" if packed else "none", "dtype": "bfloat16"}
    config = config.model_copy(update={"model": config.model.model_copy(update=values)})
    assert base_bytes(config, shape) == {"base weights": linear, "norms and biases": others}


STATES = {
    "bamba": "attn_layer_indices", "falcon_h1": "mamba_d_ssm", "lfm2_vl": "conv_L_cache", "recurrent_gemma": "lru_width",
    "zamba2": "layers_block_type", "mamba2": "state_size",
}  # fmt: skip


@pytest.mark.parametrize("family", STATES)
def test_a_model_whose_layers_carry_a_state_is_not_predicted_as_if_they_had_attention(family):
    from tests.support.model_families import config_of

    config = config_of(family).to_dict()
    assert STATES[family] in (config.get("text_config") or config)
    with pytest.raises(InputError, match="nothing is predicted for layers that carry a state|must be a positive whole number"):
        ModelShape.of(config, "x")


def test_nothing_is_predicted_for_other_layers_without_attention():
    with pytest.raises(InputError, match="layer_types = 'conv': nothing is predicted for layers without attention"):
        ModelShape.of({**LLAMA_8B, "model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "x")
    assert ModelShape.known({**LLAMA_8B, "layer_types": ["linear_attention"]}, "x") is None
    assert ModelShape.known({**LLAMA_8B, "model_type": "qwen3_5", "hidden_act": "gelu"}, "x") is None
    assert ModelShape.known({**LLAMA_8B, "layer_types": ["full_attention"]}, "x") is not None


def plan_config(cache_gib: float = 0.0, **changes: Any) -> TrainConfig:
    train = {"max_tokens": 8, "micro_batch_size": 1, "keep_layers": 0, "host_layers": 0, "weight_cache_gib": cache_gib,
             "activation_checkpointing": "keep"}  # fmt: skip
    return TrainConfig.model_validate(
        {"model": {"path": "x"}, "data": {"train": "x"}, "lora": {"rank": 4, **changes}, "train": train}
    )


@pytest.mark.parametrize("targets", ["all-linear", r".*(qkv|down|q)_proj", ["self_attn.o_proj"]])
@pytest.mark.parametrize("family", [
    "Llama", "Phi3", "Glm4", "Olmo2", "Gemma4Text", "Gemma4Text with k = v", *fused_layers.HYBRIDS])  # fmt: skip
def test_a_plan_adapts_the_layers_that_the_adapter_adapts(family, targets):
    from engine.adapter.lora import attach

    config = plan_config(target_modules=targets)
    model, names, _ = build(family, "fused")
    shape = ModelShape.of(model.config.to_dict(), family)
    layers = attach(model, names, config.lora, 0)
    planned = {(i, name) for i, members in enumerate(adapted_projections(config, shape)) for name in members}
    inside = {name for name in layers if ".layers." in name}
    assert planned == {(int(name.split(".")[2]), name.rpartition(".")[2]) for name in inside}
    assert {f"model.{name}" for name in adapted_outside(config, shape)} == layers.keys() - inside
    plans = plan_layers(config, shape)
    assert num_trained(config, shape, plans) == sum(layer.lora_a.numel() + layer.lora_b.numel() for layer in layers.values())
    assert sum(sum(plan.ranks.values()) for plan in plans) == 4 * len(inside)


@pytest.mark.parametrize("family", ["Llama", "Phi3", "Glm4", "Gemma4Text", *fused_layers.HYBRIDS])
def test_a_plan_caches_the_groups_that_the_layers_cache(family):
    model, names, _ = build(family)
    for name in names:
        layer = model.get_submodule(name)
        layer.weight = quantize_nf4(layer.weight.data, True)
    fuse_layers(model)
    shape = ModelShape.of(model.config.to_dict(), family)
    budget = int(2.5 * shape.linear_parameters)  # bf16: a layer and a quarter
    planned = [plan.cached for plan in plan_layers(plan_config(budget / 2**30), shape)]
    cache_weights(model, torch.bfloat16, budget)
    assert [frozenset(layer.weight_cache) for layer in model.model.layers] == planned
    assert 0 < sum(map(len, planned)) < 12


def test_frequencies_that_depend_on_the_row_are_not_recorded():
    def config(rope: dict[str, Any]) -> ModelShape:
        return ModelShape.of({**LLAMA_8B, "model_type": "phi3", "rope_parameters": rope}, "x")

    assert can_record(plan_config(), config({"rope_type": "default"}))
    assert not can_record(plan_config(), config({"rope_type": "longrope"}))
    assert not can_record(plan_config(), config({"sliding_attention": {"rope_type": "dynamic"}}))


def test_merged_layers_have_the_features_of_those_that_they_merge():
    plain, merged = (ModelShape.of({**LLAMA_8B, "model_type": kind}, kind) for kind in ("llama", "phi3"))
    assert merged.projections()["qkv_proj"] == (4096 + 2 * 1024, 4096)
    assert merged.projections()["gate_up_proj"] == (2 * 14336, 4096)
    assert plain.num_parameters == merged.num_parameters


def test_a_model_with_mixers_is_recorded_with_kernels_that_read_boundaries_and_says_who_computes_them():
    shape = ModelShape.of({**LLAMA_8B, "model_type": "qwen3_5"}, "x")
    assert shape.has_mixers and not can_record(plan_config(), shape)
    assert [one.mixer is None for one in shape.each] == [False, False, False, True] * 8
    told, older = shape.with_kernels(), shape.with_kernels(recordable=False)
    assert can_record(plan_config(), told) and not can_record(plan_config(), older)
    assert all(one.mixer is None or one.mixer.has_kernels for one in told.each) and told != shape
    assert told.num_parameters == shape.num_parameters
