"""Swap the decoder layers of a loaded model for fused ones, and list every swap.

Only modules of that instance change; nothing is patched. The class of a decoder layer tells its
family. A model of another family keeps its own layers, and the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.adapter.lora import LoraLinear
from engine.errors import InputError
from engine.layers.attention import AttentionOptions, Documents
from engine.layers.decoder_layer import decoder_layer
from engine.layers.host_stash import HostStash
from engine.layers.projection_group import ProjectionGroup, merged_weight
from engine.layers.structure import PROJECTIONS, Call, LayerSpec, Norm, normalize
from engine.planning.model_shape import ACTIVATIONS, FAMILIES
from engine.planning.policies import ATTENTION_PROJECTIONS, GROUPS, Policy, layer_policies

KNOWN = tuple(dict.fromkeys(FAMILIES.values()))


@dataclass(frozen=True)
class SwapReport:
    """The result of a swap.

    `fused` are the names of swapped decoder layers. `unfused` maps each other layer to the reason.
    `others` are the other modules that were swapped.
    """

    fused: tuple[str, ...]
    unfused: dict[str, str]
    others: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return one line for the user."""
        total = len(self.fused) + len(self.unfused)
        if "all" in self.unfused:
            return f"no decoder layer runs fused: {self.unfused['all']}"
        if not self.unfused:
            return f"{total} of {total} decoder layers run fused"
        name, reason = next(iter(self.unfused.items()))
        return f"{len(self.fused)} of {total} decoder layers run fused; {name}: {reason}"


class FusedLayer(nn.Module):
    """Replace a decoder layer: same children, same names, same call."""

    def __init__(self, layer: nn.Module, spec: LayerSpec) -> None:
        super().__init__()
        self.spec, self.policy = spec, Policy.KEEP
        self.replaced = (layer,)  # in a tuple, so that it is not a child: its children are already ours
        self.stash = HostStash()
        self.weight_cache: dict[str, Tensor] = {}  # group -> its weights, dequantised
        for name, child in layer.named_children():
            self.add_module(name, child)
        for name in ("attention_type", "layer_type", "is_sliding", "layer_idx", "hidden_size"):  # some models' loops read them
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(
        self,
        hidden_states: Tensor,
        *_: Any,
        position_embeddings: tuple[Tensor, Tensor],
        document_lengths: tuple[int, ...],
        document_offsets: Tensor,
        **__: Any,
    ) -> Tensor:
        """Return the layer's output [1, T, D] for hidden_states [1, T, D]."""
        layers, dtype = self.projections(), hidden_states.dtype
        groups = {
            group: ProjectionGroup.of([layers[name] for name in names], dtype, self.weight_cache.get(group))
            for group, names in GROUPS.items()
        }
        cos_TK, sin_TK = (t.squeeze(0) for t in position_embeddings)
        call = Call(self.spec, self.policy, groups, cos_TK, sin_TK, Documents(document_lengths, document_offsets), self.stash)
        adapters = [p for layer in layers.values() if isinstance(layer, LoraLinear) for p in (layer.lora_a, layer.lora_b)]
        return decoder_layer(hidden_states.squeeze(0), call, adapters).unsqueeze(0)

    def projections(self) -> dict[str, nn.Module]:
        """Return each projection by its name, with its adapter if it has one."""
        return {name: getattr(self.self_attn if name in ATTENTION_PROJECTIONS else self.mlp, name) for name in PROJECTIONS}


class FusedNorm(nn.Module):
    """Replace the decoder's final norm, with its weight under the same name."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.spec = norm.weight, _norm(norm)
        self.replaced = (norm,)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the normalised hidden_states [..., D]."""
        return normalize(hidden_states, self.spec)


def survey(model: nn.Module) -> SwapReport:
    """Report which decoder layers can run fused; swap none. The model needs no weights."""
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:  # older families have other names for them
        return SwapReport((), {"all": f"{type(model).__name__} is not of a known family"})
    reasons = {f"layers.{i}": _obstacle(layer) for i, layer in enumerate(layers)}
    fused = tuple(name for name, reason in reasons.items() if reason is None)
    return SwapReport(fused, {name: reason for name, reason in reasons.items() if reason is not None})


def fuse_layers(model: nn.Module) -> SwapReport:
    """Swap every decoder layer of a known family. Linear layers must be FrozenLinear already."""
    report = survey(model)
    decoder = model.get_decoder()
    for name in report.fused:
        layer = decoder.get_submodule(name)
        decoder.set_submodule(name, FusedLayer(layer, _spec(layer)))
    if not report.fused:
        return report
    decoder.norm = FusedNorm(decoder.norm)
    return replace(report, others=("norm",))


def restore_layers(model: nn.Module) -> None:
    """Undo `fuse_layers`. Adapters stay, because old and new layers share their children."""
    decoder = model.get_decoder()
    for name, module in list(decoder.named_modules()):
        if isinstance(module, FusedLayer | FusedNorm):
            decoder.set_submodule(name, module.replaced[0])


def set_policy(model: nn.Module, policy: Policy, keep_layers: int = 0, host_layers: int = 0) -> HostStash:
    """Set the policy of each fused layer by `layer_policies`. Return the empty stash they share."""
    stash, layers = HostStash(), _fused_layers(model)
    for layer, own in zip(layers, layer_policies(len(layers), policy, keep_layers, host_layers)):
        layer.policy, layer.stash = own, stash
    return stash


def cache_weights(model: nn.Module, dtype: torch.dtype, num_bytes: int) -> int:
    """Keep dequantised weights of fused layers: whole groups, as many as fit in `num_bytes`.

    Each use dequantises the rest. Returns the bytes kept. A second call adds and drops groups to
    match its number.
    """
    used = 0
    for layer in _fused_layers(model):
        projections = layer.projections()
        for group, names in GROUPS.items():
            bases = [b.base if isinstance(b, LoraLinear) else b for b in (projections[name] for name in names)]
            size = dtype.itemsize * sum(base.in_features * base.out_features for base in bases)
            if used + size > num_bytes or not all(base.is_packed for base in bases):
                layer.weight_cache.pop(group, None)
                continue
            used += size
            if group not in layer.weight_cache:
                layer.weight_cache[group] = merged_weight(bases, dtype)
    return used


def _fused_layers(model: nn.Module) -> list[FusedLayer]:
    return [module for module in model.modules() if isinstance(module, FusedLayer)]


def require_fused(report: SwapReport, model_path: str) -> None:
    """Raise InputError if a layer runs unfused."""
    if report.unfused:
        allowed = f"use model.layers=auto for this model; strict needs a known family ({', '.join(KNOWN)})"
        raise InputError("model.layers", f"strict, {model_path}", f"{report.describe()}; {allowed}")


def _obstacle(layer: nn.Module) -> str | None:
    kind = type(layer).__name__
    if kind not in {f"{family}DecoderLayer" for family in KNOWN}:
        return f"{kind} is not of a known family"
    missing = [n for n in PROJECTIONS if not hasattr(layer.self_attn if n in ATTENTION_PROJECTIONS else layer.mlp, n)]
    if missing:
        return f"{kind} has no {', '.join(missing)}"
    activation = _activation(layer)
    return None if activation in ACTIVATIONS else f"activation {activation} has no kernel"


def _activation(layer: nn.Module) -> str:
    config = layer.self_attn.config
    return getattr(config, "hidden_activation", None) or config.hidden_act


def _spec(layer: nn.Module) -> LayerSpec:
    attention = layer.self_attn
    window = getattr(attention, "sliding_window", None)
    if type(layer).__name__.startswith("Mistral"):
        window = getattr(attention.config, "sliding_window", None)
    four_norms = hasattr(layer, "pre_feedforward_layernorm")  # Gemma: norms before and after each half
    return LayerSpec(
        head_dim=attention.head_dim,
        activation=ACTIVATIONS[_activation(layer)],
        attention=AttentionOptions(attention.scaling, window, getattr(attention, "attn_logit_softcapping", None)),
        input_norm=_norm(layer.input_layernorm),
        mlp_norm=_norm(layer.pre_feedforward_layernorm if four_norms else layer.post_attention_layernorm),
        q_norm=_norm(getattr(attention, "q_norm", None)),
        k_norm=_norm(getattr(attention, "k_norm", None)),
        after_attention_norm=_norm(layer.post_attention_layernorm) if four_norms else None,
        after_mlp_norm=_norm(layer.post_feedforward_layernorm) if four_norms else None,
    )


def _norm(module: nn.Module | None) -> Norm | None:
    if module is None:
        return None
    offset = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    return Norm(module.weight, eps, offset)
