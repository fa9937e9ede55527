"""Plan each decoder layer of a config: its policy, adapters and dequantised weights. No torch.

It predicts the decisions that `engine.layers.swap` and `engine.model.load` take on a loaded model;
tests hold them equal.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from engine.config.matmul import FORMS, Matmul
from engine.config.targets import EXPERTS, pattern_value, target_rule
from engine.config.trial import ModelConfig, TrainConfig
from engine.errors import InputError
from engine.shape.compute_limits import HOST_EMBEDDING_MIN_BYTES
from engine.shape.experts_shape import SHARED
from engine.shape.mixer_shape import MIXER
from engine.shape.model_shape import ModelShape
from engine.shape.policies import Policy, layer_policies
from engine.units import GIB


@dataclass(frozen=True)
class LayerPlan:
    """The plan of one decoder layer.

    - ranks: group -> sum of its members' ranks, 0 if none is adapted.
    - adapter: group -> number of its trained values.
    - cached: what stays of its weights, dequantised or as INT8 codes, as `kept_name` names it.
    - trained: True if it has a backward pass, because this layer or one below is trained.
    - needs_dx: True if a layer below is trained.
    - needs_dinput: True if what makes the layer's own embedding of a token is trained.
    - matmul: how it multiplies by its frozen weights.
    - dora: True if adapted weights have gains. drops: True if their inputs have dropout.
    """

    policy: Policy
    ranks: dict[str, int]
    adapter: dict[str, int]
    cached: frozenset[str]
    trained: bool
    needs_dx: bool
    needs_dinput: bool = False
    matmul: Matmul = Matmul.BF16
    dora: bool = False
    drops: bool = False

    def has_gains(self, group: str) -> bool:
        return self.dora and self.ranks[group] > 0


def is_fused(config: TrainConfig, shape: ModelShape) -> bool:
    """Return True if decoder layers run fused."""
    return runs_fused(config.model, shape)


def evaluation_width(config: TrainConfig, shape: ModelShape) -> int | None:
    """Return the hidden size if rows of an evaluation may be longer for it; see `evaluation_row_tokens`."""
    return shape.hidden_size if is_fused(config, shape) and shape.experts is None and not shape.has_mixers else None


def runs_fused(model: ModelConfig, shape: ModelShape) -> bool:
    """Return True if decoder layers run fused. Those with experts do if the experts are packed and alone."""
    has_fused = shape.experts is None or (model.quantization == "nf4" and not shape.experts.beside_mlp)
    return shape.family != "other" and has_fused and model.layers != "original"


def can_record(config: TrainConfig, shape: ModelShape) -> bool:
    """Return True if a micro-batch can be a CUDA graph (engine/training/cuda_graphs.py).

    It must run fused, on the device alone, without attention sample by sample, a library's mixers that
    count samples on the host, or rotary frequencies that the library chooses there.
    """
    loop = config.train
    on_device = loop.activation_checkpointing != Policy.OFFLOAD and loop.host_layers == 0
    is_16_bit = config.model.dtype != "float32"
    by_library = shape.rotates_by_row or shape.has_unrecordable_mixers
    return is_fused(config, shape) and is_16_bit and on_device and not by_library


def element_bytes(config: TrainConfig) -> int:
    """Return the bytes of one activation or dequantised weight on CUDA."""
    return 4 if config.model.dtype == "float32" else 2


def adapted_projections(config: TrainConfig, shape: ModelShape) -> list[tuple[str, ...]]:
    """Return the projections of each layer that carry an adapter.

    Raises InputError if `lora.target_modules` matches none.
    """
    targets = config.lora.target_modules
    chosen = list(_matched(targets, shape))
    if any(chosen) or adapted_outside(config, shape) or any(adapted_experts(config, shape)):
        return chosen
    if shape.family == "other":  # its layers may have other names, so count all to be safe
        return [tuple(shape.projections())] * shape.num_layers
    known = dict.fromkeys(name for one in shape.each for name in one.projections())
    allowed = f"all-linear, {', '.join([*known, *shape.outside])}"
    raise InputError("lora.target_modules", targets, f"matches no linear layer; allowed: {allowed}")


def adapted_experts(config: TrainConfig, shape: ModelShape) -> list[dict[str, int]]:
    """Return the rank of each adapted weight of the experts of each layer, by name; empty without experts in NF4."""
    if shape.experts is None or config.model.quantization != "nf4":
        return [{}] * shape.num_layers
    return list(_expert_ranks(config.lora.target_modules, config.lora.rank, tuple(config.lora.rank_pattern.items()), shape))


@functools.lru_cache(maxsize=32)
def _expert_ranks(
    targets: str | tuple[str, ...], rank: int, pattern: tuple[tuple[str, int], ...], shape: ModelShape
) -> tuple[dict[str, int], ...]:
    is_target, weights = target_rule(targets), shape.experts.weights(shape.hidden_size)
    named = [{name: f"model.layers.{i}.{shape.experts.path}.{name}" for name in weights} for i in range(shape.num_layers)]
    return tuple({n: pattern_value(dict(pattern), path, rank) for n, path in own.items() if is_target(path)} for own in named)


@functools.lru_cache(maxsize=32)
def _matched(targets: str | tuple[str, ...], shape: ModelShape) -> tuple[tuple[str, ...], ...]:
    """Return the projections of each layer that the targets name: a search for a plan asks a hundred times."""
    is_target, names = target_rule(targets), []
    for i, one in enumerate(shape.each):
        paths = [shape.layer.path(group, name) for group, members in one.groups.items() for name in members]
        names.append([f"model.layers.{i}.{path}" for path in paths])
    return tuple(tuple(n.rpartition(".")[2] for n in layer if is_target(n)) for layer in names)


def plan_layers(config: TrainConfig, shape: ModelShape) -> list[LayerPlan]:
    """Return the plan of each decoder layer, from the first.

    Raises ValueError if the config leaves a field of `train` on `auto`: call `make_compute_plan`
    first.
    """
    loop = config.train
    if "auto" in (
        loop.micro_batch_size,
        loop.activation_checkpointing,
        loop.keep_layers,
        loop.host_layers,
        loop.weight_cache_gib,
    ):
        raise ValueError("predictions need a config with nothing left auto: call make_compute_plan first")
    adapted, outside = adapted_projections(config, shape), bool(adapted_outside(config, shape))
    rows = bool(config.model.train_tokens)  # the embedding's rows take a gradient through all layers
    experts = adapted_experts(config, shape)
    first = 0 if outside or rows else next(i for i, both in enumerate(zip(adapted, experts)) if any(both))
    cached = _cached(config, shape)
    plans, counts = [], (loop.keep_layers, loop.host_layers) if is_fused(config, shape) else (0, 0)
    policies = layer_policies(shape.num_layers, Policy.of(loop.activation_checkpointing), *counts)
    variant = config.lora.use_dora, config.lora.lora_dropout > 0.0
    halves, pattern = config.lora.halves, config.lora.rank_pattern
    held = tuple((key, halves * rank) for key, rank in pattern.items())
    ranks_by_layer = _ranks(halves * config.lora.rank, held, shape)
    known: dict[tuple[Any, ...], tuple[dict[str, int], ...]] = {}  # layers that are alike share them
    for i, (names, one) in enumerate(zip(adapted, shape.each)):
        key = id(one), names, *ranks_by_layer[i].values()
        if key not in known:
            known[key] = _adapter(one, names, ranks_by_layer[i], config.lora.use_dora)
        ranks, adapter = known[key]
        if shape.experts is not None:
            ranks = {**ranks, EXPERTS: sum(experts[i].values())}
            adapter = {**adapter, EXPERTS: shape.experts.adapter_values(experts[i], shape.hidden_size)}
        needs_dx, mode = i > first or rows, one.matmul_in(config.matmul)
        plans.append(LayerPlan(policies[i], ranks, adapter, cached[i], i >= first, needs_dx, outside, mode, *variant))
    return plans


def _adapter(one: ModelShape, names: tuple[str, ...], rank_of: dict[str, int], dora: bool) -> tuple[dict[str, int], ...]:
    """Return ranks and adapter of a layer's plan."""
    sizes = {name: dora * features[0] + rank_of[name] * sum(features) for name, features in one.projections().items()}
    groups = {group: [name for name in members if name in names] for group, members in one.groups.items()}
    return tuple({group: sum(of[name] for name in members) for group, members in groups.items()} for of in (rank_of, sizes))


@functools.lru_cache(maxsize=32)
def _ranks(rank: int, pattern: tuple[tuple[str, int], ...], shape: ModelShape) -> tuple[dict[str, int], ...]:
    """Return the rank that each projection of each layer would have. pattern: items of `lora.rank_pattern`."""
    named = dict(pattern)

    def rank_of(i: int, group: str, name: str) -> int:
        return pattern_value(named, f"model.layers.{i}.{shape.layer.path(group, name)}", rank) if named else rank

    groups = [one.groups.items() for one in shape.each]
    return tuple({n: rank_of(i, group, n) for group, members in items for n in members} for i, items in enumerate(groups))


def adapted_outside(config: TrainConfig, shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Return (output, input) features of the adapted linear layers outside the decoder layers."""
    is_target = target_rule(config.lora.target_modules)
    return {name: features for name, features in shape.outside.items() if is_target(f"model.{name}")}


def num_trained(config: TrainConfig, shape: ModelShape, plans: list[LayerPlan]) -> int:
    """Return the number of values in the adapter. PiSSA's frozen ones are held and stepped like the trained ones."""
    lora, found = config.lora, adapted_outside(config, shape)
    lengths = sum(out for out, _ in found.values()) if lora.use_dora else 0
    ranks = {name: lora.halves * pattern_value(lora.rank_pattern, f"model.{name}", lora.rank) for name in found}
    outside = lengths + sum(ranks[name] * sum(found[name]) for name in found)
    tokens = len(config.model.train_tokens) * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    return outside + tokens + sum(sum(plan.adapter.values()) for plan in plans)


def kept_name(group: str, form: str) -> str:
    """Return the name of what the weight cache keeps of a group: the group's own for its dequantised weights."""
    return group if form == "weights" else f"{group}.{form}"


def form_bytes(form: str, element: int) -> int:
    """Return the bytes of one weight in a form of `Matmul.forms`."""
    return element if form == "weights" else 1


def kept_bytes(config: TrainConfig) -> int:
    """Return the bytes of one weight if the weight cache keeps all that products read."""
    return sum(form_bytes(form, element_bytes(config)) for form in config.matmul.forms)


def cached_bytes(config: TrainConfig, shape: ModelShape, plans: list[LayerPlan]) -> int:
    """Return the bytes that the weight cache holds in all."""
    element, total = element_bytes(config), 0
    for plan, one in zip(plans, shape.each):
        numbers = one.weights_of_groups
        kept = (name.partition(".") for name in plan.cached)
        total += sum(form_bytes(form or "weights", element) * numbers[group] for group, _, form in kept if group != EXPERTS)
    return total + _experts_room(config, shape)


def scale_bytes(shape: ModelShape) -> int:
    """Return the bytes of one layer's INT8 scales: fp32 for each output and each input feature of a group."""
    features = shape.projections()
    groups = ([features[name] for name in names] for names in shape.groups.values())
    return sum(4 * (sum(out for out, _ in members) + members[0][1]) for members in groups)


def base_bytes(config: TrainConfig, shape: ModelShape) -> dict[str, int]:
    """Return the bytes of the frozen linear layers, and of norms and biases.

    NF4 takes half a byte a value, a scale for each 64 values, and two code tables a weight. A scale
    is fp32, or, quantised again, one byte plus an fp32 for each 256 scales.
    """
    element, linear = element_bytes(config), 0
    weights = [math.prod(features) for features in linear_layers(shape)]
    if shape.experts is not None:  # all experts of a layer are packed as one weight
        each = shape.experts.weights(shape.hidden_size).values()
        weights += [shape.experts.number * math.prod(features) for features in each] * shape.num_layers
    for number in weights:
        blocks = math.ceil(number / 64)
        scales = blocks + 4 * math.ceil(blocks / 256) + 1536 if config.model.double_quantization else 4 * blocks + 512
        linear += number // 2 + scales if config.model.quantization == "nf4" else element * number
    return {"base weights": linear, "norms and biases": element * shape.vector_parameters}


def linear_layers(shape: ModelShape) -> list[tuple[int, int]]:
    """Return (output, input) features of every linear layer but the head."""
    return [*shape.outside.values(), *(features for one in shape.each for features in one.projections().values())]


def _cached(config: TrainConfig, shape: ModelShape) -> list[frozenset[str]]:
    """Return what `train.weight_cache_gib` keeps of each layer, as `kept_name` names it.

    Whole groups of packed weights are taken form by form, in the model's order, each that still fits.
    A library's mixer dequantises its own. Experts are not kept, but have room to be dequantised.
    """
    if _experts_room(config, shape):
        return [frozenset({EXPERTS})] * shape.num_layers
    cached: list[set[str]] = [set() for _ in shape.each]
    room = int(config.train.weight_cache_gib * GIB) if config.model.quantization == "nf4" and is_fused(config, shape) else 0
    for form in FORMS:
        for kept, one in zip(cached, shape.each):
            for group, number in one.weights_of_groups.items() if form in one.matmul_in(config.matmul).forms else ():
                size = form_bytes(form, element_bytes(config)) * number
                if group not in (MIXER, SHARED) and size <= room:
                    room -= size
                    kept.add(kept_name(group, form))
    return [frozenset(kept) for kept in cached]


def cacheable_bytes(config: TrainConfig, shape: ModelShape) -> int:
    """Return the most bytes that `train.weight_cache_gib` can use."""
    if shape.experts is None:
        return kept_bytes(config) * shape.all_linear_parameters
    return shape.experts.dequantized_bytes(shape.hidden_size, both=is_fused(config, shape))


def _experts_room(config: TrainConfig, shape: ModelShape) -> int:
    """Return the bytes that a layer's experts take while they are dequantised, 0 if the cache has no room for that.

    Fused layers use room for both weights, to dequantise one of them less often.
    """
    if shape.experts is None or config.model.quantization != "nf4" or config.model.dtype == "float32":
        return 0
    sizes = [shape.experts.dequantized_bytes(shape.hidden_size, both) for both in (False, is_fused(config, shape))]
    return max((size for size in sizes if size <= config.train.weight_cache_gib * GIB), default=0)


def is_on_host(config: TrainConfig, table_bytes: int) -> bool:
    """Return True if engine/vocabulary/host_embedding.py stores the input embedding on the host.

    The embedding must not be tied to the head.
    """
    wanted = config.model.embeddings
    return wanted == "host" or (wanted == "auto" and table_bytes >= HOST_EMBEDDING_MIN_BYTES)
