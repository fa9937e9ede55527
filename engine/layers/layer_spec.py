"""Read a library's decoder layer into a `LayerSpec`, by the description of its family.

The numbers come from the loaded layer itself: its norms, scaling, window and flags. The description
only says where they are. What a description names and the layer lacks is an obstacle, never a
default.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from torch import nn

from engine.layers.attention import AttentionOptions
from engine.layers.structure import AttentionSpec, LayerSpec, MlpSpec, Norm, QueryScale
from engine.planning.families import ACTIVATIONS, FAMILIES, WINDOWED, Family, HalfNorms


def family_of(layer: nn.Module) -> Family | None:
    """Return the family of a decoder layer, known by the name of its class; None if unknown."""
    kind = type(layer).__name__
    return next((family for family in FAMILIES.values() if kind == f"{family.name}DecoderLayer"), None)


def obstacle(layer: nn.Module) -> str | None:
    """Return why a decoder layer cannot run fused, or None if it can."""
    kind, family = type(layer).__name__, family_of(layer)
    if family is None:
        return f"{kind} is not of a known family"
    missing = [path for path in _paths(family) if not _has(layer, path)]
    if missing:
        return f"{kind} has no {', '.join(missing)}"
    config = layer.self_attn.config
    for key in family.no_dropout:
        if getattr(config, key, 0):
            return f"{key} = {getattr(config, key)} is not computed"
    activation = _activation(config)
    if activation not in ACTIVATIONS:
        return f"activation {activation} has no kernel"
    features = sum(_features(layer.self_attn))
    made = sum(attrgetter(path)(layer).out_features for path in family.paths["qkv"])
    return None if made == features else f"{kind} makes {made} features of queries, keys and values instead of {features}"


def layer_spec(layer: nn.Module) -> LayerSpec:
    """Return the spec of a decoder layer that has no obstacle."""
    family, attention = family_of(layer), layer.self_attn
    window, scale = _window(layer, family), None
    if family.query_scale:
        rope = attention.config.rope_parameters
        scale = QueryScale(rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"])
    factor = None if family.multiplier is None else float(attrgetter(family.multiplier)(layer))
    q_norm, k_norm = (None, None) if family.qk_norm == "none" else (getattr(attention, name) for name in family.qk_norms)
    return LayerSpec(
        AttentionSpec(
            **_norms(layer, family.attention, family),
            multiplier=factor,
            head_dim=attention.head_dim,
            features=_features(attention),
            options=AttentionOptions(attention.scaling, window, getattr(attention, "attn_logit_softcapping", None)),
            q_norm=_norm(q_norm, family),
            k_norm=_norm(k_norm, family),
            norms_rotated=family.norms_rotated,
            rotary=family.rotary if _rotates(layer, family, window) else None,
            query_scale=scale,
        ),
        MlpSpec(
            **_norms(layer, family.mlp, family),
            multiplier=factor,
            activation=ACTIVATIONS[_activation(attention.config)],
        ),
        family.paths,
    )


def final_norm(norm: nn.Module, layer: nn.Module) -> Norm:
    """Return the decoder's final norm, which is of the same kind as those of its layers."""
    return _norm(norm, family_of(layer))


def _paths(family: Family) -> Iterator[str]:
    """Yield every path that the description names."""
    yield from ("self_attn.config", "self_attn.head_dim", "self_attn.scaling")
    for half in (family.attention, family.mlp):
        yield from (f"{name}.weight" for name in (half.before, half.after) if name is not None)
    for members in family.paths.values():
        yield from members
    if family.qk_norm != "none":
        yield from (f"self_attn.{name}" for name in family.qk_norms)
    others = (family.window, family.slides, family.multiplier, family.rotates)
    yield from (path for path in others if path not in (None, WINDOWED))


def _has(layer: nn.Module, path: str) -> bool:
    try:
        attrgetter(path)(layer)
    except AttributeError:
        return False
    return True


def _activation(config: Any) -> str:
    return getattr(config, "hidden_activation", None) or config.hidden_act


def _features(attention: nn.Module) -> tuple[int, int, int]:
    """Return how many features are queries, keys and values."""
    config, width = attention.config, attention.head_dim
    return config.num_attention_heads * width, config.num_key_value_heads * width, config.num_key_value_heads * width


def _window(layer: nn.Module, family: Family) -> int | None:
    if family.window is None or (family.slides is not None and not attrgetter(family.slides)(layer)):
        return None
    return attrgetter(family.window)(layer)


def _rotates(layer: nn.Module, family: Family, window: int | None) -> bool:
    if family.rotates is None:
        return True
    if family.rotates == WINDOWED:
        return window is not None or attrgetter(family.window)(layer) is None
    return bool(attrgetter(family.rotates)(layer))


def _norms(layer: nn.Module, half: HalfNorms, family: Family) -> dict[str, Norm | None]:
    return {
        place: None if name is None else _norm(attrgetter(name)(layer), family)
        for place, name in (("before", half.before), ("after", half.after))
    }


def _norm(module: nn.Module | None, family: Family) -> Norm | None:
    if module is None:
        return None
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    return Norm(module.weight, eps, family.norm_offset, family.norm_rounds_once)
