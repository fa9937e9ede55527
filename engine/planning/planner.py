"""Plan how a card computes a config: micro-batch, kept activations, dequantised weights, graphs.

`make_compute_plan` tries values for the fields that the config leaves `auto`. It drops plans that
are predicted not to fit, and takes the fastest of the rest. `leaner` returns the next smaller plan
after a run has run out of memory. A plan changes the results only by rounding.

It needs no torch, so a laptop can plan for any card.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from engine.config.trial import TrainConfig
from engine.errors import OutOfMemory
from engine.memory.prediction import MemoryPrediction, fits, predict_memory
from engine.planning.cards import Card
from engine.planning.compute_plan import ComputePlan
from engine.planning.speed import predict_speed
from engine.shape.layer_plan import can_record
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
HOST_USES = "input embeddings and activations in host memory (offload, host_layers)"


def make_compute_plan(
    config: TrainConfig, shape: ModelShape | None, card: Card | None, host_gib: float = math.inf
) -> ComputePlan:
    """Return the fastest plan for `config` that fits the card, or `train.memory_budget_gib` of it.

    Without shape or card (an unknown model, a CPU) nothing is predicted, and `auto` means one bin
    at a time. `host_gib` is the host memory in which the layers of this process may store
    activations. Raises OutOfMemory if the leanest plan does not fit.
    """
    if shape is None or card is None:
        return _unpredicted(config, on_cpu=card is None)
    memory_gib = min(card.memory_gib, config.train.memory_budget_gib or card.memory_gib)
    candidates = [c for c in _candidates(config, shape, card, memory_gib, host_gib) if c.memory.host_gib <= host_gib]
    if not candidates:
        raise OutOfMemory(f"{HOST_USES} need more than the {host_gib:.1f} GiB allowed")
    fitting = [candidate for candidate in candidates if fits(candidate.memory, memory_gib)]
    if not fitting:
        raise does_not_fit(min((c.memory for c in candidates), key=lambda memory: memory.peak_bytes), memory_gib)
    return _best(fitting, config.data.max_seq_length)


def does_not_fit(memory: MemoryPrediction, memory_gib: float) -> OutOfMemory:
    """Return the error for a config whose leanest plan needs more memory than there is."""
    need = memory.peak_gib + memory.reserve_gib
    return OutOfMemory(f"needs at least {need:.1f} GiB (predicted), {memory_gib:.1f} GiB are allowed", memory.peak_gib, None)


def leaner(current: ComputePlan, config: TrainConfig, shape: ModelShape | None) -> ComputePlan | None:
    """Return the plan to try after running out of memory, or None if there is no leaner one.

    It drops CUDA graphs first, then halves the micro-batch, then keeps fewer tensors.
    """
    changes = _less(current)
    return None if changes is None else changed(current, changes, config, shape)


def changed(current: ComputePlan, settings: dict[str, Any], config: TrainConfig, shape: ModelShape | None) -> ComputePlan:
    """Return the plan with other settings of `train`.

    Its memory is predicted again if the shape is known.
    """
    changes = dict(settings)
    if "activation_checkpointing" in changes:
        changes["policy"] = Policy.of(changes.pop("activation_checkpointing"))
    other = replace(current, **changes, memory=None, speed=None)
    return other if shape is None else replace(other, memory=predict_memory(other.apply(config), shape))


def _less(current: ComputePlan) -> dict[str, Any] | None:
    if current.cuda_graphs:  # they keep their memory between two rows
        return {"cuda_graphs": False}
    if current.micro_batch_size > 1:
        return {"micro_batch_size": current.micro_batch_size // 2}
    if current.weight_cache_gib:
        return {"weight_cache_gib": 0.0}
    place = LADDER.index(current.policy)
    if current.keep_layers and place > 0:
        return {"keep_layers": 0}
    if current.host_layers:
        return {"host_layers": 0}
    return {"activation_checkpointing": LADDER[place + 1].setting, "keep_layers": 0} if place + 1 < len(LADDER) else None


def _unpredicted(config: TrainConfig, on_cpu: bool) -> ComputePlan:
    loop, unknown = config.train, Policy.KEEP if on_cpu else Policy.RECOMPUTE
    return ComputePlan(
        1 if loop.micro_batch_size == "auto" else min(loop.micro_batch_size, config.bins_per_step),
        unknown if loop.activation_checkpointing == "auto" else Policy.of(loop.activation_checkpointing),
        1 if loop.keep_layers == "auto" else loop.keep_layers,
        0 if loop.host_layers == "auto" else loop.host_layers,
        0.0 if loop.weight_cache_gib == "auto" else loop.weight_cache_gib,
        loop.cuda_graphs is True,
    )


def _candidates(config: TrainConfig, shape: ModelShape, card: Card, memory_gib: float, host_gib: float) -> Iterator[ComputePlan]:
    """Yield plans for every micro-batch and policy that the config leaves open.

    Each gets as many kept layers, layers on the host and cached weights as fit and help.
    """
    loop, bins = config.train, config.bins_per_step
    if loop.micro_batch_size == "auto":
        sizes = _sizes(bins, max(1, 2 * LONG_ROW // config.data.max_seq_length))
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
            )
            plans = list(_filled(config, shape, card, memory_gib, lean))
            yield from plans
            if policy is Policy.KEEP and fits(plans[0].memory, memory_gib):
                break  # a policy that keeps less is slower
            if loop.host_layers == "auto" and policy is not Policy.KEEP and loop.cuda_graphs is not True:
                for keep_layers in (lean.keep_layers, 0) if loop.keep_layers == "auto" else (lean.keep_layers,):
                    chosen = _on_host(config, shape, card, host_gib, replace(lean, keep_layers=keep_layers))
                    filled = list(_filled(config, shape, card, memory_gib, chosen)) if chosen.host_layers else []
                    yield from filled
                    if filled and fits(filled[0].memory, memory_gib):
                        break  # without the kept layers, the host has room for fewer others


def _on_host(config: TrainConfig, shape: ModelShape, card: Card, host_gib: float, lean: ComputePlan) -> ComputePlan:
    """Return the plan with the fastest number of layers on the host, as far as its memory allows.

    More layers than the link can serve are slower.
    """

    def with_layers(number: int) -> ComputePlan:
        return replace(lean, host_layers=number)

    speeds = [_speed(lean, config, shape, card)]
    while speeds[-1] >= max(speeds) and HOST_STEP * len(speeds) <= shape.num_layers:
        speeds.append(_speed(with_layers(HOST_STEP * len(speeds)), config, shape, card))
    most = HOST_STEP * speeds.index(max(speeds))
    return with_layers(_largest(0, most, lambda n: _memory(with_layers(n), config, shape).host_gib <= host_gib))


def _filled(config: TrainConfig, shape: ModelShape, card: Card, memory_gib: float, lean: ComputePlan) -> Iterator[ComputePlan]:
    """Yield a lean plan, then the same with kept layers and cached weights that fill the memory."""
    first = _predicted(lean, config, shape, card)
    yield first
    if not fits(first.memory, memory_gib):
        if config.train.keep_layers == "auto" and lean.keep_layers:
            yield _predicted(replace(lean, keep_layers=0), config, shape, card)
        return
    full = first
    if config.train.keep_layers == "auto" and lean.policy is not Policy.KEEP:
        most = _largest(1, shape.num_layers, lambda n: _fits(replace(lean, keep_layers=n), config, shape, memory_gib))
        full = _predicted(replace(lean, keep_layers=most), config, shape, card)
        yield full
    if config.train.weight_cache_gib == "auto":
        weights = 2 * shape.all_linear_parameters
        steps = math.ceil(min(memory_gib, weights / GIB) / CACHE_STEP_GIB)
        room = _largest(0, steps, lambda n: _fits(replace(full, weight_cache_gib=n * CACHE_STEP_GIB), config, shape, memory_gib))
        yield _predicted(replace(full, weight_cache_gib=room * CACHE_STEP_GIB), config, shape, card)


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


def _fits(candidate: ComputePlan, config: TrainConfig, shape: ModelShape, memory_gib: float) -> bool:
    return fits(_memory(candidate, config, shape), memory_gib)


def _best(fitting: list[ComputePlan], max_seq_length: int) -> ComputePlan:
    """Return the fastest plan.

    Among plans of nearly that speed, prefer one without host memory, whose speed no data sheet
    tells. Then prefer the longest rows, then the least memory.
    """
    fastest = max(p.speed.tokens_per_second for p in fitting)
    near = [p for p in fitting if p.speed.tokens_per_second >= (1.0 - NEGLIGIBLE) * fastest]
    return min(
        near, key=lambda p: (p.memory.host_bytes > 0, -min(LONG_ROW, p.micro_batch_size * max_seq_length), p.memory.peak_bytes)
    )


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
