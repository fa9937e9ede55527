"""Swap the decoder layers of a loaded model for fused ones, and list every swap.

Only modules of that instance change; nothing is patched. The class of a decoder layer tells its
family (layer_spec.py). A model of another family keeps its own layers, and the report says so.
"""

from __future__ import annotations

from collections.abc import Container, MutableMapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from engine.adapter.lora import LoraLinear
from engine.config.matmul import FORMS, Matmul
from engine.errors import InputError
from engine.layers.attention import Documents
from engine.layers.decoder_layer import decoder_layer
from engine.layers.host_stash import HostStash
from engine.layers.layer_spec import decoder_norm, layer_spec, obstacle
from engine.layers.library.experts_half import ExpertsBlock
from engine.layers.library.library_mixer import LibraryMixer
from engine.layers.projection_group import ProjectionGroup
from engine.layers.structure import Call, ExpertsSpec, LayerSpec, MixerSpec, Norm, normalize
from engine.quant.frozen_linear import FrozenLinear
from engine.quant.int8_weight import Int8Group
from engine.quant.matrices import merged_weight
from engine.shape.families import FAMILIES
from engine.shape.layer_plan import form_bytes, kept_name
from engine.shape.policies import Policy, layer_policies

PER_LAYER_NORM = "per_layer_projection_norm"
"""The norm of the inputs that each layer has of its own. By itself it would keep them four times, in fp32."""


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
        self.int8: dict[str, Int8Group] = {}  # groups whose products are in INT8 in training
        for name, child in layer.named_children():
            self.add_module(name, child)
        for name, buffer in layer.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        has_mixer = isinstance(spec.attention, MixerSpec)
        self.mixer = LibraryMixer(getattr(self, spec.attention.name)) if has_mixer else None
        self.block = ExpertsBlock(getattr(self, spec.mlp.name)) if isinstance(spec.mlp, ExpertsSpec) else None
        # some models' loops read these
        for name in ("attention_type", "layer_type", "block_type", "is_sliding", "layer_idx", "hidden_size"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(
        self,
        hidden_states: Tensor,
        per_layer_input: Tensor | None = None,
        *_: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        document_lengths: tuple[int, ...],
        document_offsets: Tensor,
        document_cache: Any = None,
        position_ids: Tensor | None = None,
        shared_kv_states: MutableMapping[str, tuple[Tensor, Tensor]] | None = None,
        **__: Any,
    ) -> Tensor:
        """Return the layer's output [1, T, D] for hidden_states [1, T, D].

        `per_layer_input` is [1, T, P]. `shared_kv_states` maps a kind of layers to keys and values
        [1, G, T, K], which some layers store and others read.
        """
        groups, dtype, int8 = self.projections(), hidden_states.dtype, self.int8 if self.training else {}
        cos_TR, sin_TR = (None, None) if position_embeddings is None else (t.squeeze(0) for t in position_embeddings)
        call = Call(
            self.spec,
            self.policy,
            {name: ProjectionGroup.of(ls, dtype, self.weight_cache.get(name), int8.get(name)) for name, ls in groups.items()},
            cos_TR,
            sin_TR,
            Documents(document_lengths, document_offsets, document_cache),
            self.stash,
            self._query_factors(position_ids, document_lengths),
        )
        half, tail = self.spec.attention, self.spec.tail
        if self.mixer is not None:
            call.mixer, call.mixer_seed = self.mixer, self.mixer.new_seed()
        if self.block is not None:
            call.block, call.block_seed = self.block, self.block.new_seed()
        if half.reads:
            call.shared = tuple(t.squeeze(0).transpose(0, 1) for t in shared_kv_states[self.self_attn.layer_type])
        if tail is not None and tail.norm is not None:
            call.input_TP = per_layer_input.squeeze(0)
        adapted = [layer for layers in groups.values() for layer in layers if isinstance(layer, LoraLinear)]
        adapters = [] if self.mixer is None else self.mixer.adapters
        adapters += [parameter for layer in adapted for parameter in layer.parameters_of()]
        adapters += [] if self.block is None else self.block.adapters
        y_TD, *stored = decoder_layer(hidden_states.squeeze(0), call, adapters)
        if half.stores and shared_kv_states is not None:
            shared_kv_states[self.self_attn.layer_type] = tuple(t.transpose(0, 1).unsqueeze(0) for t in stored)
        return y_TD.unsqueeze(0)

    def projections(self) -> dict[str, list[nn.Module]]:
        """Return the projections of each group, with their adapters if they have one."""
        return {group: [attrgetter(path)(self) for path in paths] for group, paths in self.spec.groups.items()}

    def _query_factors(self, position_ids: Tensor | None, lengths: tuple[int, ...]) -> Tensor | None:
        """Return the factor of each token's queries [T]; None if all are 1."""
        scale = getattr(self.spec.attention, "query_scale", None)
        if scale is None or max(lengths) <= scale.length:
            return None
        return scale.factors(position_ids.squeeze(0))


class FusedNorm(nn.Module):
    """Replace a norm of the decoder outside its layers, with its weight under the same name."""

    def __init__(self, norm: nn.Module, spec: Norm) -> None:
        super().__init__()
        self.weight, self.spec = norm.weight, spec
        self.replaced = (norm,)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the normalised hidden_states [..., D]."""
        return normalize(hidden_states, self.spec)


def survey(model: nn.Module, packs_experts: bool = False) -> SwapReport:
    """Report which decoder layers can run fused; swap none. The model needs no weights.

    packs_experts: the library's experts are going to be packed. Others do not run fused.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:  # older families have other names for them
        return SwapReport((), {"all": f"{type(model).__name__} is not of a known family"})
    reasons = {f"layers.{i}": obstacle(layer, packs_experts) for i, layer in enumerate(layers)}
    fused = tuple(name for name, reason in reasons.items() if reason is None)
    return SwapReport(fused, {name: reason for name, reason in reasons.items() if reason is not None})


def fuse_layers(model: nn.Module) -> SwapReport:
    """Swap every decoder layer of a known family. Linear layers must be FrozenLinear already."""
    report = survey(model)
    decoder = model.get_decoder()
    for name in report.fused:
        layer = decoder.get_submodule(name)
        decoder.set_submodule(name, FusedLayer(layer, layer_spec(layer)))
    if not report.fused:
        return report
    names = [name for name in ("norm", PER_LAYER_NORM) if hasattr(decoder, name)]
    for name in names:
        setattr(decoder, name, FusedNorm(getattr(decoder, name), decoder_norm(getattr(decoder, name), layer)))
    return replace(report, others=tuple(names))


def restore_layers(model: nn.Module) -> None:
    """Undo `fuse_layers`. Adapters stay, because old and new layers share their children."""
    decoder = model.get_decoder()
    for name, module in list(decoder.named_modules()):
        if isinstance(module, FusedLayer | FusedNorm):
            decoder.set_submodule(name, module.replaced[0])


def set_policy(
    model: nn.Module, policy: Policy, keep_layers: int = 0, host_layers: int = 0, stash: HostStash | None = None
) -> HostStash:
    """Set the policy of each fused layer by `layer_policies`. Return the empty stash they share.

    A stash that is given lends them the host memory that it has.
    """
    stash, layers = HostStash() if stash is None else stash, _fused_layers(model)
    policies = layer_policies(len(layers), policy, keep_layers, host_layers)
    stash.clear()
    stash.num_layers = sum(own.is_on_host for own in policies)
    for layer, own in zip(layers, policies):
        layer.policy, layer.stash = own, stash
    return stash


def set_matmul(model: nn.Module, mode: Matmul, exempt: Container[str] = (), kind: type[Int8Group] = Int8Group) -> list[str]:
    """Set how frozen layers multiply in training. Return the names of those that stay in the working dtype.

    exempt: names of layers that stay so. A group of a fused layer stays with each of its members.
    Groups that have this mode and kind already keep their codes. Layers whose weights were released,
    beside the text decoder, never multiply and are not named.
    """
    linears = {name.removesuffix(".base"): one for name, one in model.named_modules() if isinstance(one, FrozenLinear)}
    names = {one: name for name, one in linears.items() if not one.weight.is_meta}
    stay, fused = [], set()

    def made(bases: list[FrozenLinear], known: Int8Group | None) -> Int8Group | None:
        if any(names[base] in exempt for base in bases):
            chosen = None
        elif type(known) is kind and known.mode is mode:
            chosen = known
        else:
            chosen = kind.of(bases, mode)
        stay.extend(names[base] for base in bases if chosen is None and mode is not Matmul.BF16)
        return chosen

    for layer in _fused_layers(model):
        groups = {group: _bases(members) for group, members in layer.projections().items()}
        found = {group: made(bases, layer.int8.get(group)) for group, bases in groups.items()}
        layer.int8 = {group: int8 for group, int8 in found.items() if int8 is not None}
        fused.update(base for bases in groups.values() for base in bases)
    for base in names.keys() - fused:
        base.int8 = made([base], base.int8)
    return sorted(stay)


def int8_groups(model: nn.Module) -> list[tuple[list[str], Int8Group]]:
    """Return the groups that multiply in INT8 in training, each with the names of its layers."""
    names = {one: name.removesuffix(".base") for name, one in model.named_modules() if isinstance(one, FrozenLinear)}
    inside = [int8 for layer in _fused_layers(model) for int8 in layer.int8.values()]
    outside = [one.int8 for one in names if one.int8 is not None]
    return [([names[base] for base in int8.bases], int8) for int8 in (*inside, *outside)]


def cache_weights(model: nn.Module, dtype: torch.dtype, num_bytes: int) -> int:
    """Keep what products of fused layers read: whole groups, as many as fit in `num_bytes`.

    These are dequantised weights for products in `dtype`, and codes for those in INT8, in the order
    of FORMS. Each use makes the rest. Returns the bytes kept. A second call adds and drops
    groups to match its number.
    """
    groups = [
        (layer, group, _bases(members)) for layer in _fused_layers(model) for group, members in layer.projections().items()
    ]
    used, kept = 0, [set() for _ in groups]
    for form in FORMS:
        for mine, (layer, group, bases) in zip(kept, groups):
            mode = layer.int8[group].mode if group in layer.int8 else Matmul.BF16
            size = form_bytes(form, dtype.itemsize) * sum(base.in_features * base.out_features for base in bases)
            if form in mode.forms and used + size <= num_bytes and all(base.is_packed for base in bases):
                used += size
                mine.add(form)
    for mine, (layer, group, bases) in zip(kept, groups):
        if "weights" not in mine:
            layer.weight_cache.pop(group, None)
        elif group not in layer.weight_cache:
            layer.weight_cache[group] = merged_weight(bases, dtype)
        if group in layer.int8:
            layer.int8[group].keep(*sorted(mine - {"weights"}))
    return used


def cached_weights(model: nn.Module) -> dict[tuple[int, str], int]:
    """Return the address of each group's weights and codes that `cache_weights` keeps, by layer and name."""
    found: dict[tuple[int, str], int] = {}
    for i, layer in enumerate(_fused_layers(model)):
        found |= {(i, group): weight.data_ptr() for group, weight in layer.weight_cache.items()}
        for group, int8 in layer.int8.items():
            found |= {(i, kept_name(group, direction)): kept.codes_NK.data_ptr() for direction, kept in int8.kept.items()}
    return found


def _bases(members: list[nn.Module]) -> list[FrozenLinear]:
    return [member.base if isinstance(member, LoraLinear) else member for member in members]


def fused_projections(model: nn.Module) -> set[nn.Module]:
    """Return the linear layers, adapted or not, that fused layers compute."""
    return {one for layer in _fused_layers(model) for group in layer.projections().values() for one in group}


def mixers(model: nn.Module) -> list[LibraryMixer]:
    """Return the library's token mixers that fused layers call; they may wait for the device."""
    return [layer.mixer for layer in _fused_layers(model) if layer.mixer is not None]


def _fused_layers(model: nn.Module) -> list[FusedLayer]:
    return [module for module in model.modules() if isinstance(module, FusedLayer)]


def require_fused(report: SwapReport, model_path: str) -> None:
    """Raise InputError if a layer runs unfused."""
    if report.unfused:
        known = ", ".join(family.name for family in FAMILIES.values())
        allowed = f"use model.layers=auto for this model; strict needs a known family ({known})"
        raise InputError("model.layers", f"strict, {model_path}", f"{report.describe()}; {allowed}")
