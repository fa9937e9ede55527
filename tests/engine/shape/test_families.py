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
from engine.shape.layer_plan import adapted_outside, adapted_projections, can_record, num_trained, plan_layers
from engine.shape.model_shape import ModelShape
from tests.support import fused_layers
from tests.support.fused_layers import build
from tests.support.published_models import LLAMA_8B

NUMBERS = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 64}

PREDICTED = [family for family in fused_layers.FAMILIES if family not in fused_layers.HYBRIDS]


def transformers_config(family: str, **given: Any) -> dict[str, Any]:
    """Return what transformers makes of a config.json with these values alone."""
    from transformers import CONFIG_MAPPING

    kind = f"{family}_text" if OTHER_TYPES.get(f"{family}_text") == family else family
    return CONFIG_MAPPING[kind](**given).to_dict()


@pytest.mark.parametrize("family", PREDICTED)
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
    vectors = sum(p.numel() for n, p in model.model.named_parameters() if p.dim() == 1)
    assert vectors == shape.vector_parameters


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.mixer is None])
def test_what_a_config_leaves_out_means_what_transformers_takes_it_for(family):
    """But for the numbers above, which every config.json of a released model has."""
    filled = transformers_config(family, **NUMBERS)
    assert ModelShape.of({"model_type": family, **NUMBERS}, "x") == ModelShape.of({**filled, "model_type": family}, "x")
    for key, value in FAMILIES[family].defaults.items():
        assert transformers_config(family)[key] == value, key


@pytest.mark.parametrize("family", PREDICTED)
def test_a_shape_and_a_survey_agree_on_what_runs_fused(family):
    model, _, _ = build(family)
    config, keys = model.config, FAMILIES[ModelShape.of(model.config.to_dict(), family).family].no_dropout
    for key, value in [*((key, 0.1) for key in keys), ("hidden_act", "relu")]:
        name = "hidden_activation" if key == "hidden_act" and hasattr(config, "hidden_activation") else key
        before = getattr(config, name)
        setattr(config, name, value)
        assert not survey(model).fused and ModelShape.of(config.to_dict(), family).family == "other", key
        setattr(config, name, before)
    assert survey(model).fused and ModelShape.of(config.to_dict(), family).family != "other"


def test_a_layer_without_the_norms_that_its_description_needs_runs_unfused(monkeypatch):
    monkeypatch.setitem(fused_layers.FAMILIES, "HyperCLOVAX", {"use_post_norm": False})
    model, _, _ = build("HyperCLOVAX")
    assert "has no post_norm1.weight, post_norm2.weight" in survey(model).describe()
    assert ModelShape.of(model.config.to_dict(), "x").family == "other"


@pytest.mark.parametrize("family", fused_layers.HYBRIDS)
def test_nothing_is_predicted_for_layers_without_attention(family):
    model, _, _ = build(family)
    config = model.config.to_dict()
    with pytest.raises(InputError, match="layer_types = 'linear_attention': nothing is predicted for layers without attention"):
        ModelShape.of(config, "x")
    assert ModelShape.known({**config, "layer_types": None}, "x") is None
    assert ModelShape.known({**LLAMA_8B, "model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "x") is None
    assert ModelShape.known({**LLAMA_8B, "layer_types": ["full_attention"]}, "x") is not None


def plan_config(cache_gib: float = 0.0, **changes: Any) -> TrainConfig:
    train = {"max_tokens": 8, "micro_batch_size": 1, "keep_layers": 0, "host_layers": 0, "weight_cache_gib": cache_gib,
             "activation_checkpointing": "keep"}  # fmt: skip
    return TrainConfig.model_validate(
        {"model": {"path": "x"}, "data": {"train": "x"}, "lora": {"rank": 4, **changes}, "train": train}
    )


@pytest.mark.parametrize("targets", ["all-linear", r".*(qkv|down|q)_proj", ["self_attn.o_proj"]])
@pytest.mark.parametrize("family", ["Llama", "Phi3", "Glm4", "Olmo2", "Gemma4Text", "Gemma4Text with k = v"])
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


@pytest.mark.parametrize("family", ["Llama", "Phi3", "Glm4", "Gemma4Text"])
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
