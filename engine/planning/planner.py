"""Plan how a card computes a config: micro-batch, kept activations, dequantised weights, graphs.

`make_compute_plan` tries values for the fields that the config leaves `auto`. It drops plans that
are predicted not to fit, and takes the fastest of the rest. engine/planning/ladder.py makes the
plan after a run has run out of memory. A plan changes the results only by rounding.

It needs no torch, so a laptop can plan for any card.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from engine.config.trial import TrainConfig
from engine.errors import OutOfMemory
from engine.memory.prediction import MemoryPrediction, predict_memory
from engine.planning.cards import Card
from engine.planning.compute_plan import ComputePlan
from engine.planning.memory_limit import Lessons, MemoryLimit, Validity
from engine.planning.speed import predict_speed
from engine.shape.layer_plan import cacheable_bytes, can_record
from engine.shape.model_shape import ModelShape
from engine.shape.policies import LADDER, Policy
from engine.units import GIB

CACHE_STEP_GIB = 1.0
HOST_STEP = 2  # layers
WORTH_RECORDING = 0.1  # share of a step that the device would wait for the host
# Plans whose speed differs by less than this share are equal: other criteria decide (`_best`).
NEGLIGIBLE = 0.01
# Tokens. In longer rows, the time of launches no longer matters. The predicted speed of small
# models leaves it out.
LONG_ROW = 8192
# Tokens. From here on, a plan with recorded launches is better than an unrecorded one with longer rows.
RECORDED_ROW = LONG_ROW // 2
HOST_USES = "input embeddings and activations in host memory (offload, host_layers)"


def make_compute_plan(
    config: TrainConfig,
    shape: ModelShape | None,
    card: Card | None,
    host_gib: float = math.inf,
    *,
    lessons: Lessons | None = None,
    predicted_gib: float = math.inf,
    validity: Validity | None = None,
) -> ComputePlan:
    """Return the fastest plan for `config` that fits the card, or `train.memory_budget_gib` of it.

    Without shape or card (an unknown model, a CPU) nothing is predicted, and `auto` means one bin
    at a time. `host_gib` is the host memory in which the layers of this process may store
    activations. `lessons` are what earlier trials in this process showed, and `predicted_gib` is the
    most that a plan may be predicted to need. `validity` takes note of the limits within which the plan
    would be the same. Raises OutOfMemory if the leanest plan does not fit.
    """
    if shape is None or card is None:
        return _unpredicted(config, on_cpu=card is None)
    limit = MemoryLimit(allowed_gib(config, card), lessons or Lessons(), predicted_gib, host_gib, validity or Validity())
    if config.train.offload_optimizer != "auto":
        return _chosen(config, shape, card, limit)
    try:
        return _chosen(_with(config, offload_optimizer=False), shape, card, limit)
    except OutOfMemory as without:
        if not config.optim.has_8bit_states:
            raise
        try:
            return _chosen(_with(config, offload_optimizer=True), shape, card, limit)
        except OutOfMemory as error:
            raise (without if error.predicted_gib is None else error) from None


def _chosen(config: TrainConfig, shape: ModelShape, card: Card, limit: MemoryLimit) -> ComputePlan:
    """Return the fastest plan, with the optimizer's states where the config says."""
    candidates = [c for c in _candidates(config, shape, card, limit) if limit.fits_host(c.memory)]
    if not candidates:
        states = " and optimizer states (offload_optimizer)" if config.train.offload_optimizer is True else ""
        raise OutOfMemory(f"{HOST_USES}{states} need more than the {limit.host_gib:.1f} GiB allowed")
    fitting = [candidate for candidate in candidates if limit.fits(candidate)]
    if not fitting:
        raise does_not_fit(min((c.memory for c in candidates), key=lambda memory: memory.peak_bytes), limit.memory_gib)
    return _best(fitting, config.bin_tokens)


def allowed_gib(config: TrainConfig, card: Card) -> float:
    """Return the GiB of the card that a trial may use."""
    return min(card.memory_gib, config.train.memory_budget_gib or card.memory_gib)


def does_not_fit(memory: MemoryPrediction, memory_gib: float) -> OutOfMemory:
    """Return the error for a config whose leanest plan needs more memory than there is."""
    need = memory.need_gib
    return OutOfMemory(f"needs at least {need:.1f} GiB (predicted), {memory_gib:.1f} GiB are allowed", memory.peak_gib, None)


def changed(current: ComputePlan, settings: dict[str, Any], config: TrainConfig, shape: ModelShape | None) -> ComputePlan:
    """Return the plan with other settings of `train`.

    Its memory is predicted again if the shape is known.
    """
    changes = dict(settings)
    if "activation_checkpointing" in changes:
        changes["policy"] = Policy.of(changes.pop("activation_checkpointing"))
    other = replace(current, **changes, memory=None, speed=None)
    return other if shape is None else replace(other, memory=predict_memory(other.apply(config), shape))


def _unpredicted(config: TrainConfig, on_cpu: bool) -> ComputePlan:
    loop, unknown = config.train, Policy.KEEP if on_cpu else Policy.RECOMPUTE
    return ComputePlan(
        1 if loop.micro_batch_size == "auto" else min(loop.micro_batch_size, config.bins_per_step),
        unknown if loop.activation_checkpointing == "auto" else Policy.of(loop.activation_checkpointing),
        1 if loop.keep_layers == "auto" else loop.keep_layers,
        0 if loop.host_layers == "auto" else loop.host_layers,
        0.0 if loop.weight_cache_gib == "auto" else loop.weight_cache_gib,
        loop.cuda_graphs is True,
        config.matmul,
        loop.offload_optimizer is True,
    )


def _candidates(config: TrainConfig, shape: ModelShape, card: Card, limit: MemoryLimit) -> Iterator[ComputePlan]:
    """Yield plans for every micro-batch and policy that the config leaves open.

    Each gets as many kept layers, layers on the host and cached weights as fit and help.
    """
    loop, bins = config.train, config.bins_per_step
    if loop.micro_batch_size == "auto":
        sizes = _sizes(bins, max(1, 2 * LONG_ROW // config.bin_tokens))
    else:
        sizes = [min(loop.micro_batch_size, bins)]
    policies = LADDER if loop.activation_checkpointing == "auto" else (Policy.of(loop.activation_checkpointing),)
    for size in sizes:
        for policy in policies:
            lean = ComputePlan(
                size,
                policy,
                min(1, shape.num_layers) if loop.keep_layers == "auto" else min(loop.keep_layers, shape.num_layers),
                0 if loop.host_layers == "auto" else min(loop.host_layers, shape.num_layers),
                0.0 if loop.weight_cache_gib == "auto" else loop.weight_cache_gib,
                loop.cuda_graphs is True,
                config.matmul,
                loop.offload_optimizer is True,
            )
            plans = list(_filled(config, shape, card, limit, lean))
            yield from plans
            if plans[0].cuda_graphs and loop.cuda_graphs == "auto" and (limit.lessons.factors or not limit.fits(plans[0])):
                yield from _filled(_with(config, cuda_graphs=False), shape, card, limit, lean)
            if policy is Policy.KEEP and limit.fits(plans[0]):
                break  # a policy that keeps less is slower
            if loop.host_layers == "auto" and policy is not Policy.KEEP and loop.cuda_graphs is not True:
                for keep_layers in (lean.keep_layers, 0) if loop.keep_layers == "auto" else (lean.keep_layers,):
                    chosen = _on_host(config, shape, card, limit, replace(lean, keep_layers=keep_layers))
                    filled = list(_filled(config, shape, card, limit, chosen)) if chosen.host_layers else []
                    yield from filled
                    if filled and limit.fits(filled[0]):
                        break  # without the kept layers, the host has room for fewer others


def _with(config: TrainConfig, **loop: Any) -> TrainConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=loop)})


def _on_host(config: TrainConfig, shape: ModelShape, card: Card, limit: MemoryLimit, lean: ComputePlan) -> ComputePlan:
    """Return the plan with the fastest number of layers on the host, as far as its memory allows.

    More layers than the link can serve are slower.
    """

    def with_layers(number: int) -> ComputePlan:
        return replace(lean, host_layers=number)

    speeds = [_speed(lean, config, shape, card)]
    while speeds[-1] >= max(speeds) and HOST_STEP * len(speeds) <= shape.num_layers:
        speeds.append(_speed(with_layers(HOST_STEP * len(speeds)), config, shape, card))
    most = HOST_STEP * speeds.index(max(speeds))
    return with_layers(_largest(0, most, lambda n: limit.fits_host(_memory(with_layers(n), config, shape))))


def _filled(config: TrainConfig, shape: ModelShape, card: Card, limit: MemoryLimit, lean: ComputePlan) -> Iterator[ComputePlan]:
    """Yield a lean plan, then the same with kept layers and cached weights that fill the memory.

    Room for dequantised experts may be worth more than kept layers, so the memory is filled in the other order too.
    """
    loop = config.train
    keeps = loop.keep_layers == "auto" and lean.policy is not Policy.KEEP
    caches = loop.weight_cache_gib == "auto" and (shape.experts is None or card.has_grouped_products)  # else it is of no use

    def fits(plan: ComputePlan) -> bool:
        return limit.fits(replace(plan, memory=_memory(plan, config, shape)))

    def with_kept(plan: ComputePlan, fewest: int = 1) -> ComputePlan:
        most = _largest(fewest, shape.num_layers, lambda n: fits(replace(plan, keep_layers=n)))
        return _predicted(replace(plan, keep_layers=most), config, shape, card)

    def with_cache(plan: ComputePlan) -> ComputePlan:
        steps = math.ceil(min(limit.memory_gib, cacheable_bytes(config, shape) / GIB) / CACHE_STEP_GIB)
        room = _largest(0, steps, lambda n: fits(replace(plan, weight_cache_gib=n * CACHE_STEP_GIB)))
        return _predicted(replace(plan, weight_cache_gib=room * CACHE_STEP_GIB), config, shape, card)

    first = _predicted(lean, config, shape, card)
    yield first
    if not limit.fits(first):
        if config.train.keep_layers == "auto" and lean.keep_layers:
            yield _predicted(replace(lean, keep_layers=0), config, shape, card)
        return
    full = first
    if keeps:
        yield (full := with_kept(first))
    if caches:
        yield with_cache(full)
    if keeps and caches and shape.experts is not None:
        yield with_kept(with_cache(replace(first, keep_layers=0)), fewest=0)


def _predicted(candidate: ComputePlan, config: TrainConfig, shape: ModelShape, card: Card) -> ComputePlan:
    """Return the plan with predicted memory and speed.

    It uses CUDA graphs if the config leaves that open and the device would wait for the host.
    """
    concrete = candidate.apply(config)
    speed = predict_speed(concrete, shape, card)
    waits = speed.parts["waiting for the host"] > WORTH_RECORDING * speed.step_time_ms
    if waits and config.train.cuda_graphs == "auto" and can_record(concrete, shape):
        candidate = replace(candidate, cuda_graphs=True)
        speed = predict_speed(candidate.apply(config), shape, card)
    return replace(candidate, memory=_memory(candidate, config, shape), speed=speed)


def _speed(candidate: ComputePlan, config: TrainConfig, shape: ModelShape, card: Card) -> float:
    return predict_speed(candidate.apply(config), shape, card).tokens_per_second


def _memory(candidate: ComputePlan, config: TrainConfig, shape: ModelShape) -> MemoryPrediction:
    return predict_memory(candidate.apply(config), shape)


def _best(fitting: list[ComputePlan], bin_tokens: int) -> ComputePlan:
    """Return the fastest plan.

    Among plans of nearly that speed, prefer one without host memory, whose speed no data sheet
    tells. Then prefer recorded launches: no prediction knows how busy a host is, or how often rows of
    a new size make it load kernels. Then prefer the longest rows, then the least memory.
    """
    fastest = max(p.speed.tokens_per_second for p in fitting)

    def cost(plan: ComputePlan) -> tuple[bool, bool, int, int]:
        row = min(LONG_ROW, plan.micro_batch_size * bin_tokens)
        return plan.memory.host_bytes > 0, not (plan.cuda_graphs and row >= RECORDED_ROW), -row, plan.memory.peak_bytes

    return min((p for p in fitting if p.speed.tokens_per_second >= (1.0 - NEGLIGIBLE) * fastest), key=cost)


def _sizes(bins: int, most: int) -> list[int]:
    """Return the micro-batch sizes that divide a step of `bins` evenly, up to `most`."""
    return [size for size in range(1, min(bins, most) + 1) if bins % size == 0]


def _largest(low: int, high: int, good: Callable[[int], bool]) -> int:
    """Return the largest good number in low..high.

    All numbers below a good one must be good. `low` is taken as good and is not tried.
    """
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle) else (low, middle - 1)
    return low
