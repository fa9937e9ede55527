"""Read a library's decoder layer into a `LayerSpec`, by the description of its family.

The numbers come from the loaded layer itself: its norms, scaling, window and flags. The description
only says where they are. What a description names and the layer lacks is an obstacle, never a
default.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from engine.kernels.ops import MAX_HEAD
from engine.layers.attention import AttentionOptions
from engine.layers.structure import AttentionSpec, ExpertsSpec, LayerSpec, MixerSpec, MlpSpec, Norm, QueryScale, TailSpec
from engine.quant.frozen_experts import FrozenExperts
from engine.shape.families import ACTIVATIONS, FAMILIES, WINDOWED, Family, HalfNorms


def family_of(layer: nn.Module) -> Family | None:
    """Return the family of a decoder layer, known by the name of its class; None if unknown."""
    kind = type(layer).__name__
    return next((family for family in FAMILIES.values() if kind == f"{family.name}DecoderLayer"), None)


def obstacle(layer: nn.Module, packs_experts: bool = False) -> str | None:
    """Return why a decoder layer cannot run fused, or None if it can. packs_experts: as `swap.survey` has it."""
    kind, family = type(layer).__name__, family_of(layer)
    if family is None:
        return f"{kind} is not of a known family"
    for paths in (_flags(layer, family), _paths(layer, family)):  # the flags say which of the others there are
        if missing := [path for path in paths if not _has(layer, path)]:
            return f"{kind} has no {', '.join(missing)}"
    if present := [path for path in family.lacks if attrgetter(path)(layer)]:
        return f"{kind} with {', '.join(present)} is not computed"
    if not has_mixer(layer) and getattr(layer.self_attn, "is_causal", True) is False:
        return "attention that is not causal is not computed"
    if has_experts(layer) and not packs_experts and not isinstance(attrgetter(family.experts)(layer), FrozenExperts):
        return "experts that are not packed in NF4 are not computed"
    config = _config(layer)
    for key in family.no_dropout:
        if getattr(config, key, 0):
            return f"{key} = {getattr(config, key)} is not computed"
    if not has_mixer(layer) and layer.self_attn.head_dim > MAX_HEAD:
        return f"attention over heads of more than {MAX_HEAD} features has no kernel"
    activation = None if has_experts(layer) else _activation(config)  # experts have their own
    if activation is not None and activation not in ACTIVATIONS:
        return f"activation {activation} has no kernel"
    if has_mixer(layer):
        return None
    features = sum(_features(layer, family))
    made = sum(attrgetter(path)(layer).out_features for path in _groups(layer, family)["qkv"])
    return None if made == features else f"{kind} makes {made} features of queries, keys and values instead of {features}"


def layer_spec(layer: nn.Module) -> LayerSpec:
    """Return the spec of a decoder layer that has no obstacle."""
    family = family_of(layer)
    factor = None if family.multiplier is None else float(attrgetter(family.multiplier)(layer))
    frame = {**_norms(layer, family.attention, family), "multiplier": factor}
    return LayerSpec(
        MixerSpec(**frame, name=family.mixer) if has_mixer(layer) else _attention_spec(layer, family, frame),
        _mlp_spec(layer, family, {**_norms(layer, family.mlp, family), "multiplier": factor}),
        _groups(layer, family),
        _tail(layer, family),
    )


def has_mixer(layer: nn.Module) -> bool:
    """Return True if the library's own token mixer stands in attention's place in this layer."""
    family = family_of(layer)
    return family is not None and family.mixer is not None and hasattr(layer, family.mixer)


def has_experts(layer: nn.Module) -> bool:
    """Return True if a mixture of experts stands in the MLP's place in this layer."""
    family = family_of(layer)
    return family is not None and family.experts is not None and _has(layer, family.experts)


def _mlp_spec(layer: nn.Module, family: Family, frame: dict[str, Any]) -> MlpSpec | ExpertsSpec:
    if has_experts(layer):
        return ExpertsSpec(**frame, name=family.experts.partition(".")[0])
    return MlpSpec(**frame, activation=ACTIVATIONS[_activation(_config(layer))])


def _attention_spec(layer: nn.Module, family: Family, frame: dict[str, Any]) -> AttentionSpec:
    attention, window, scale = layer.self_attn, _window(layer, family), None
    if family.query_scale:
        rope = attention.config.rope_parameters
        scale = QueryScale(rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"])
    q_norm, k_norm = (None, None) if family.qk_norm == "none" else (getattr(attention, name, None) for name in family.qk_norms)
    features = _features(layer, family)
    return AttentionSpec(
        **frame,
        head_dim=attention.head_dim,
        features=features,
        options=AttentionOptions(attention.scaling, window, getattr(attention, "attn_logit_softcapping", None)),
        q_norm=_norm(q_norm, family),
        k_norm=_norm(k_norm, family),
        norms_rotated=family.norms_rotated,
        v_norm=_unweighted(attention.v_norm, attention.q_norm) if family.normalises_values and features[1] else None,
        stores=_is_set(layer, family.stores),
        rotary=family.rotary if _rotates(layer, family, window) else None,
        query_scale=scale,
        output_gate=family.output_gate,
        sinks=None if family.sinks is None else attrgetter(family.sinks)(layer),
        half_tables=family.half_tables,
    )


def decoder_norm(norm: nn.Module, layer: nn.Module) -> Norm:
    """Return a norm of the decoder outside its layers, which is of the same kind as theirs."""
    return _norm(norm, family_of(layer))


def _flags(layer: nn.Module, family: Family) -> Iterator[str]:
    """Yield the paths of numbers and flags that the description names for this layer."""
    if has_mixer(layer):
        yield from () if has_experts(layer) else ("mlp.config",)
        others = (family.multiplier, *family.lacks)
        yield from (path for path in others if path is not None)
        return
    yield from ("self_attn.config", "self_attn.head_dim", "self_attn.scaling")
    others = (family.window, family.slides, family.multiplier, family.rotates, family.reads, family.stores)
    others += (family.keys_are_values, family.tail_width, family.scalar, family.sinks, *family.lacks)
    yield from (path for path in others if path not in (None, WINDOWED))


def _paths(layer: nn.Module, family: Family) -> Iterator[str]:
    """Yield the paths of the modules that the description names for this layer."""
    for half in (family.attention, family.mlp):
        yield from (f"{name}.weight" for name in (half.before, half.after) if name is not None)
    for members in _groups(layer, family).values():
        yield from members
    if has_mixer(layer):
        return
    own = not _is_set(layer, family.reads)
    if family.qk_norm != "none":
        yield from (f"self_attn.{name}" for name in family.qk_norms[: 2 if own else 1])
    if family.normalises_values and own:
        yield "self_attn.v_norm"
    if _is_set(layer, family.tail_width):
        yield family.tail_norm


def _groups(layer: nn.Module, family: Family) -> dict[str, tuple[str, ...]]:
    """Return the paths of this layer's projections, by group."""
    mlp = {} if has_experts(layer) else {group: family.paths[group] for group in ("gate_up", "down")}
    if has_mixer(layer):
        return mlp
    queries, *others = family.paths["qkv"]
    if _is_set(layer, family.reads):
        others = []
    elif _is_set(layer, family.keys_are_values):
        others = others[:1]
    tail = family.tail if _is_set(layer, family.tail_width) else {}
    return {"qkv": (queries, *others), "o": family.paths["o"], **mlp, **tail}


def _features(layer: nn.Module, family: Family) -> tuple[int, int, int]:
    """Return how many features of the projections are queries, keys and values."""
    config, width = layer.self_attn.config, layer.self_attn.head_dim
    queries = config.num_attention_heads * width
    made = 2 * queries if family.output_gate else queries
    if _is_set(layer, family.reads):
        return made, 0, 0
    heads = getattr(layer.self_attn, "num_key_value_groups", None)  # it may differ from layer to layer
    keys = queries // heads if heads else config.num_key_value_heads * width
    return made, keys, 0 if _is_set(layer, family.keys_are_values) else keys


def _tail(layer: nn.Module, family: Family) -> TailSpec | None:
    scalar = None if family.scalar is None else attrgetter(family.scalar)(layer)
    if not _is_set(layer, family.tail_width):
        return None if scalar is None else TailSpec(scalar=scalar)
    activation = ACTIVATIONS[_activation(layer.self_attn.config)]
    return TailSpec(_norm(getattr(layer, family.tail_norm), family), activation, scalar)


def _is_set(layer: nn.Module, path: str | None) -> bool:
    return path is not None and bool(attrgetter(path)(layer))


def _has(layer: nn.Module, path: str) -> bool:
    try:
        attrgetter(path)(layer)
    except AttributeError:
        return False
    return True


def _config(layer: nn.Module) -> Any:
    """Return the config of attention or MLP; None for a library's mixer before experts, which have none."""
    if not has_mixer(layer):
        return layer.self_attn.config
    return getattr(layer.mlp, "config", None)


def _activation(config: Any) -> str:
    return getattr(config, "hidden_activation", None) or config.hidden_act


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


def _unweighted(module: nn.Module, like: nn.Module) -> Norm:
    """Return a norm without weights, as wide as another one."""
    return Norm(torch.ones_like(like.weight), module.eps, 0.0, round_once=True)
