"""Choose the plan to try after a step has run out of memory. No torch.

Where model and card are known, it is the fastest plan that needs less by a real margin: often one
with fewer dequantised weights, seldom one with half the micro-batch. Elsewhere nothing is
predicted, and a fixed ladder gives up first what costs the least time.
"""

from __future__ import annotations

import math
from typing import Any

from engine.config.trial import TrainConfig
from engine.errors import OutOfMemory
from engine.planning.cards import Card
from engine.planning.compute_plan import ComputePlan
from engine.planning.memory_limit import MARGIN, Lessons
from engine.planning.planner import allowed_gib, changed, make_compute_plan
from engine.shape.model_shape import ModelShape
from engine.shape.policies import LADDER, Policy

SHORT_ROW = 4096  # tokens; with fewer in a micro-batch, the device may wait for the host
OPEN = ("micro_batch_size", "activation_checkpointing", "keep_layers", "host_layers", "weight_cache_gib", "offload_optimizer")


def leaner(
    failed: ComputePlan,
    config: TrainConfig,
    shape: ModelShape | None,
    card: Card | None,
    host_gib: float = math.inf,
    *,
    lessons: Lessons,
    had_gib: float = math.inf,
) -> ComputePlan | None:
    """Return the plan to try after `failed` ran out of memory, or None if there is no leaner one.

    `had_gib` is the device memory that the failed attempt got before it asked for more. `lessons`
    learn from the failure. A value that the config fixes changes only if no plan keeps it.
    """
    if shape is None or card is None or failed.memory is None:
        changes = _less(failed, config)
        return None if changes is None else changed(failed, changes, config, shape)
    available = min(allowed_gib(config, card), had_gib)
    lessons.learn(failed, available)
    most = (1.0 - MARGIN) * min(failed.need_gib, available)
    for wanted in (config, _opened(config)):
        try:
            return make_compute_plan(wanted, shape, card, host_gib, lessons=lessons, predicted_gib=most)
        except OutOfMemory:
            continue
    return _next_smaller(failed, config, shape)


def _opened(config: TrainConfig) -> TrainConfig:
    """Return the config with all fields of the plan `auto`, and the same number of bins in a step."""
    loop = config.train
    step = {"tokens_per_step": config.bins_per_step * config.bin_tokens}
    graphs = {"cuda_graphs": "auto" if loop.cuda_graphs is True else loop.cuda_graphs}
    return config.model_copy(update={"train": loop.model_copy(update={**step, **graphs, **dict.fromkeys(OPEN, "auto")})})


def _next_smaller(failed: ComputePlan, config: TrainConfig, shape: ModelShape) -> ComputePlan | None:
    """Return the first plan down the fixed ladder that is predicted to need less: none fits, but one may."""
    plan = failed
    while (changes := _less(plan, config)) is not None:
        plan = changed(plan, changes, config, shape)
        if plan.need_gib < (1.0 - MARGIN) * failed.need_gib:
            return plan
    return plan if _needs(plan) < _needs(failed) else None


def _needs(plan: ComputePlan) -> tuple[float, int]:
    """Return what the plan needs in GiB, and its peak after loading, which the failed plan got through."""
    later = [size for phase, size in plan.memory.phases.items() if phase not in ("load", "start")]
    return plan.need_gib, max(later, default=0)


def _less(current: ComputePlan, config: TrainConfig) -> dict[str, Any] | None:
    """Return the changes that make a plan leaner: what costs the least time goes first."""
    tokens, place = current.micro_batch_size * config.bin_tokens, LADDER.index(current.policy)
    if current.weight_cache_gib:
        return {"weight_cache_gib": 0.0}
    if current.micro_batch_size > 1 and tokens > SHORT_ROW:
        return {"micro_batch_size": current.micro_batch_size // 2}
    if current.policy in (Policy.KEEP, Policy.SELECTIVE):
        return {"activation_checkpointing": LADDER[place + 1].setting, "keep_layers": 0}
    if current.keep_layers:
        return {"keep_layers": 0}
    if current.cuda_graphs:  # short rows without them wait for the host
        return {"cuda_graphs": False}
    if current.micro_batch_size > 1:
        return {"micro_batch_size": current.micro_batch_size // 2}
    if current.host_layers:
        return {"host_layers": 0}
    if place + 1 < len(LADDER):
        return {"activation_checkpointing": LADDER[place + 1].setting}
    return {"offload_optimizer": True} if config.optim.has_8bit_states and not current.offload_optimizer else None
