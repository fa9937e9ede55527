"""Judge the families of transformers' causal-LM mapping as the guard does, on tiny models."""

from __future__ import annotations

import warnings
from typing import Any

from engine.config.trial import ModelConfig
from engine.errors import InputError
from engine.model.guard import choose_route
from engine.model.route import ModelVerdict

LFM2_LAYERS = (["conv", "conv", "full_attention"] * 11)[:32]
SETTINGS: dict[str, dict[str, Any]] = {
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"lm_head_multiplier": 0.04, "embedding_multiplier": 5.0},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1},
    "granitemoehybrid": {"logits_scaling": 8.0},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hyperclovax": {"logits_scaling": 4.0},
    "lfm2": {"layer_types": LFM2_LAYERS},
    "lfm2_moe": {"layer_types": LFM2_LAYERS},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}
"""Values that released checkpoints have and the defaults of the config class lack."""


def families() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def judge(model_type: str, **given: Any) -> ModelVerdict | InputError:
    """Return the guard's verdict, or the line that refuses the family."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = CONFIG_MAPPING[model_type](**SETTINGS.get(model_type, {}))
        try:
            return choose_route(
                config,
                ModelConfig(path=model_type, **given),
                lambda small, name: AutoModelForCausalLM.from_config(small, attn_implementation=name),
            )
        except InputError as error:
            return error


def kind(verdict: ModelVerdict | InputError) -> str:
    """Return how a family is trained, in a few words."""
    if isinstance(verdict, InputError):
        return "refused"
    if not verdict.checked:
        return "checked on the real weights only"
    layers = "fused layers" if verdict.route.fused else "its own layers"
    return "; ".join(filter(None, [layers, verdict.route.describe()]))
