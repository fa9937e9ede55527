"""Read the numbers that decide a model's memory and speed from its config.json. No torch.

Shape letters: D hidden, F MLP hidden, H query heads, G key/value heads, K head dim, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from engine.config.matmul import Matmul
from engine.errors import InputError
from engine.shape.compute_limits import takes_int8
from engine.shape.experts_shape import EXPERTS, ROUTER, SHARED, ExpertsShape, experts_of
from engine.shape.families import ACTIVATIONS, FAMILIES, INPUT_GATE, INPUT_PROJECTION, OTHER, OTHER_TYPES, WITHOUT_GATE, Family
from engine.shape.layer_shapes import LINEAR, Keys, LayerShape, gemma4_layers, hybrid_layers
from engine.shape.library_bytes import LibraryBytes
from engine.shape.mixer_shape import MIXER, MixerShape

STATES = ("mamba_", "ssm_", "lru_", "conv_L_", "state_size", "time_step_", "attn_layer_", "layers_block_type", "block_types")
"""Beginnings of keys of config.json that only models have whose layers carry a state, whatever else they hold."""
MAY_SLIDE = ("qwen2", "qwen3", "qwen3_moe", "qwen2_vl", "qwen2_5_vl")
"""Families whose window counts only if `use_sliding_window` is true."""

NOT_PREDICTED = "nothing is predicted for such a model with experts"


@dataclass(frozen=True)
class ModelShape:
    """The shape of a model's text decoder.

    - qkv_bias, o_bias, mlp_bias: True if these projections have a bias.
    - family: a key of FAMILIES, or "other".
    - has_gate: False if the MLP multiplies by no gate, so that it has one matrix less.
    - attention_softcap: True if scores pass through a tanh, which torch's fast attention lacks.
    - sliding_window: number of keys that a query sees; None if it sees all.
    - rotates_by_row: True if rotary frequencies depend on the longest sample of a row, which the
      library looks for on the host.
    - keys, source, reads_first, mixer: as in LayerShape.
    - input_width: features of each layer's own embedding of a token, 0 for none. input_rows: tokens
      in that table.
    - library: the bytes that the library's own layers allocate, if they run unfused and were measured.
    - experts: those of each layer, in the MLP's place or beside it.
    - layers: what each layer has of its own; empty if all are alike. Then `each` gives their shapes,
      and the numbers above are those of the config alone.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    family: str = "llama"
    has_gate: bool = True
    attention_softcap: bool = False
    sliding_window: int | None = None
    rotates_by_row: bool = False
    keys: Keys = "own"
    source: int | None = None
    reads_first: bool = False
    mixer: MixerShape | None = None
    input_width: int = 0
    input_rows: int = 0
    layers: tuple[LayerShape, ...] = ()
    library: LibraryBytes | None = None
    experts: ExpertsShape | None = None

    @classmethod
    def known(cls, config: dict[str, Any], where: str) -> ModelShape | None:
        """Return `of`, or None if the config has other names for these numbers.

        Such a model can be trained, but nothing is predicted for it.
        """
        try:
            return cls.of(config, where)
        except InputError:
            return None

    @classmethod
    def of(cls, config: dict[str, Any], where: str) -> ModelShape:
        """Return the shape in the content of a config.json, or in its `text_config` if it has one.

        Raises InputError, which names `where`, for a number that is missing or not positive.
        """
        outer, config = config, config.get("text_config") or config
        if not isinstance(config, dict):
            raise InputError(f"{where}: text_config", config, "must be an object")
        kind = str(config.get("model_type") or outer.get("model_type") or "")
        kind = OTHER_TYPES.get(kind, kind)
        family, layer = _family(kind, config), FAMILIES.get(kind, OTHER)
        known = {"tie_word_embeddings": outer.get("tie_word_embeddings"), **layer.defaults}
        given = {k: v for k, v in config.items() if v is not None}
        names_experts = any(key in given for key in EXPERTS)  # under one of several names
        values = {k: v for k, v in known.items() if v is not None and not (names_experts and k in EXPERTS)} | given

        def number(key: str, default: int | None = None) -> int:
            value = values.get(key, default)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{where}: {key}", value, "must be a positive whole number in config.json")
            return value

        if family == "other" and (stateful := [key for key in config if key.startswith(STATES) and config[key] is not None]):
            raise InputError(f"{where}: {stateful[0]}", config[stateful[0]], "nothing is predicted for layers that carry a state")
        if others := _not_attention(layer, config, is_fused=family == kind):
            raise InputError(f"{where}: layer_types", ", ".join(others), "nothing is predicted for layers without attention")
        num_heads = number("num_attention_heads")
        hidden_size = number("hidden_size")
        head_dim = number("head_dim", hidden_size // num_heads)
        experts = experts_of(kind, values, number, num_heads)
        for key in EXPERTS:
            if experts is None and isinstance(config.get(key), int) and config[key] > 1:
                raise InputError(f"{where}: {key}", config[key], NOT_PREDICTED)
        if experts is None and layer.experts is not None:
            raise InputError(f"{where}: model_type", kind, NOT_PREDICTED)
        window, softcap = (config.get(key, layer.defaults.get(key)) for key in ("sliding_window", "attn_logit_softcapping"))
        if family in MAY_SLIDE and not values.get("use_sliding_window", False):
            window = None
        num_layers = number("num_hidden_layers")
        width = number(layer.tail_width) if layer.tail_width and values.get(layer.tail_width) else 0
        shape = cls(
            num_layers=num_layers,
            hidden_size=hidden_size,
            intermediate_size=number("intermediate_size", experts and experts.width),  # some mixtures have no other
            num_heads=num_heads,
            num_kv_heads=number("num_key_value_heads", num_heads),
            head_dim=head_dim,
            vocab_size=number("vocab_size"),
            tied_embeddings=bool(values.get("tie_word_embeddings", False)),
            qkv_bias=_has_bias(layer, "qkv", values),
            o_bias=_has_bias(layer, "o", values),
            mlp_bias=_has_bias(layer, "gate_up", values),
            family=family,
            has_gate=family != "other" or kind not in WITHOUT_GATE,
            attention_softcap=family in ("gemma2", "vaultgemma") and bool(softcap),
            sliding_window=window if isinstance(window, int) and not isinstance(window, bool) else None,
            rotates_by_row=_rotates_by_row(values),
            input_width=width,
            input_rows=number("vocab_size_per_layer_input") if width else 0,
            experts=experts,
        )
        layers = gemma4_layers if layer.reads else hybrid_layers if layer.mixer else None
        return shape if layers is None else replace(shape, layers=layers(values, shape, number))

    @property
    def layer(self) -> Family:
        """Return the description of the decoder layers."""
        return FAMILIES.get(self.family, OTHER)

    @cached_property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Return the linear layers of a decoder layer, by group."""
        groups = self.layer.groups
        others = {} if self.experts is None else self.experts.groups
        mlp = {} if self.experts and not self.experts.beside_mlp else {name: groups[name] for name in ("gate_up", "down")}
        if self.mixer is not None:
            return {MIXER: self.layer.mixing, **mlp, **others}
        made = {"own": groups["qkv"], "values": groups["qkv"][:2], "shared": groups["qkv"][:1]}[self.keys]
        if not mlp:
            return {"qkv": made, "o": groups["o"], **others}
        up = groups["gate_up"] if self.has_gate else groups["gate_up"][-1:]
        return {**groups, "qkv": made, "gate_up": up, **(self.layer.tail if self.input_width else {}), **others}

    @cached_property
    def each(self) -> tuple[ModelShape, ...]:
        """Return the shape of each decoder layer, as that of a model whose layers are all like it."""
        if not self.layers:
            return (self,) * self.num_layers
        return tuple(replace(self, layers=(), **vars(layer)) for layer in self.layers)

    @property
    def has_mixers(self) -> bool:
        """Return True if some layers have a library's token mixer in attention's place."""
        return any(one.mixer is not None for one in self.each)

    @property
    def has_unrecordable_mixers(self) -> bool:
        """Return True if a library's token mixer of some layer cannot be part of a CUDA graph."""
        return any(one.mixer is not None and not one.mixer.is_recordable for one in self.each)

    def with_kernels(self, recordable: bool = True) -> ModelShape:
        """Return the same model with mixers that flash-linear-attention computes. recordable: `MixerShape.is_recordable`."""
        known = {"has_kernels": True, "is_recordable": recordable}
        mixers = [one.mixer and replace(one.mixer, **known) for one in self.layers]
        return replace(self, layers=tuple(replace(one, mixer=mixer) for one, mixer in zip(self.layers, mixers)))

    @property
    def outside(self) -> dict[str, tuple[int, int]]:
        """Return (output, input) features of the linear layers outside the decoder layers, by name."""
        size = (self.num_layers * self.input_width, self.hidden_size)
        return dict.fromkeys(self.layer.outside, size) if self.input_width else {}

    @property
    def input_table(self) -> int:
        """Return the number of values in the table of all layers' own embeddings."""
        return self.input_rows * self.num_layers * self.input_width

    def projections(self) -> dict[str, tuple[int, int]]:
        """Return (output, input) features of a decoder layer's linear layers, by name."""
        return self._projections

    @cached_property
    def _projections(self) -> dict[str, tuple[int, int]]:
        D, F = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        P = self.input_width
        sizes = {INPUT_GATE: ((P,), D), INPUT_PROJECTION: ((D,), P)} if P else {}
        q_made = 2 * q if self.layer.output_gate else q
        made = (q_made, kv, kv) if self.keys == "own" else (q_made, kv)[: len(self.groups.get("qkv", ()))]
        sizes |= {"qkv": (made, D), "o": ((D,), q), "gate_up": ((F, F) if self.has_gate else (F,), D), "down": ((D,), F)}
        found = {}
        for group, members in self.groups.items():
            if group == MIXER or group in (SHARED, ROUTER):
                found |= self.mixer.projections(D) if group == MIXER else self.experts.linear_layers(D)
                continue
            outputs, inputs = sizes[group]
            outputs = outputs if len(members) == len(outputs) else (sum(outputs),)  # one merged layer
            found |= {name: (size, inputs) for name, size in zip(members, outputs)}
        return found

    def matmul_in(self, mode: Matmul) -> Matmul:
        """Return how a decoder layer multiplies in this mode: as in BF16 if INT8 products take none of its groups."""
        sizes = ([self.projections()[name] for name in names] for names in self.groups.values() if names)
        return mode if mode is Matmul.BF16 or any(takes_int8(mode, m[0][1], sum(o for o, _ in m)) for m in sizes) else Matmul.BF16

    @property
    def linear_parameters(self) -> int:
        """Return the number of weights in the linear layers of one decoder layer."""
        return sum(math.prod(features) for features in self.projections().values())

    @cached_property
    def weights_of_groups(self) -> dict[str, int]:
        """Return the number of weights in each of `groups`."""
        return {group: sum(math.prod(self._projections[name]) for name in names) for group, names in self.groups.items()}

    @property
    def all_linear_parameters(self) -> int:
        """Return the number of weights in all linear layers but the head, and in experts."""
        experts = 0 if self.experts is None else self.num_layers * self.experts.parameters(self.hidden_size)
        return experts + sum(one.linear_parameters for one in self.each) + sum(math.prod(size) for size in self.outside.values())

    @property
    def vector_parameters(self) -> int:
        """Return the number of values in all norms and biases, those outside the layers included."""
        return sum(one._vectors_of_a_layer for one in self.each) + self.hidden_size + self.input_width

    @property
    def _vectors_of_a_layer(self) -> int:
        D, F, K, layer = self.hidden_size, self.intermediate_size, self.head_dim, self.layer
        norms = (layer.attention.number + layer.mlp.number + (self.input_width > 0)) * D
        others = 0 if self.experts is None else self.experts.other_parameters(D)
        if self.mixer is not None:
            return norms + self.mixer.vector_parameters + (2 * F + D if self.mlp_bias else 0) + others
        heads = {"none": 0, "head": 1 if self.keys == "shared" else 2, "whole": self.num_heads + self.num_kv_heads}[layer.qk_norm]
        queries = 2 * self.num_heads if layer.output_gate else self.num_heads
        bias = (queries + 2 * self.num_kv_heads) * K if self.qkv_bias else 0
        bias += (D if self.o_bias else 0) + (2 * F + D if self.mlp_bias and self.experts is None else 0)
        return norms + heads * K + bias + others

    @property
    def num_parameters(self) -> int:
        """Return the number of all parameters; tied embeddings count once."""
        embeddings = (1 if self.tied_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.all_linear_parameters + self.vector_parameters + embeddings + self.input_table


def _family(kind: str, config: dict[str, Any]) -> str:
    """Return the key of the family, or "other" if its layers run unfused with these values."""
    activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if kind not in FAMILIES or (activation not in ACTIVATIONS and FAMILIES[kind].experts is None):
        return "other"
    values = {**FAMILIES[kind].defaults, **config}
    fits = all(values.get(key) for key in FAMILIES[kind].needs) and not any(values.get(key) for key in FAMILIES[kind].no_dropout)
    return kind if fits else "other"


def _not_attention(layer: Family, config: dict[str, Any], is_fused: bool) -> list[str]:
    """Return the kinds of layers that have something else in attention's place, which nobody counts."""
    given = config.get("layer_types")
    kinds = {str(name) for name in given} if isinstance(given, list) else {LINEAR} if layer.mixer else set()
    known = LINEAR if layer.mixer and is_fused else None
    return sorted(name for name in kinds if name != known and (name == LINEAR or not name.endswith("attention")))


def _has_bias(layer: Family, group: str, values: dict[str, Any]) -> bool:
    key = layer.biases.get(group, False)
    return key if isinstance(key, bool) else bool(values.get(key, False))


def _rotates_by_row(values: dict[str, Any]) -> bool:
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kinds = [rope, *rope.values()] if isinstance(rope, dict) else []
    return any((k.get("rope_type") or k.get("type")) in ("dynamic", "longrope") for k in kinds if isinstance(k, dict))
