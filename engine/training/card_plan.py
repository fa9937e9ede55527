"""Make the compute plan of a trial for this machine's card."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace

import torch

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.layers.library_kernels import FLASH_LINEAR_ATTENTION, calls_kernels
from engine.memory.prediction import CONTEXT_GIB
from engine.model.base import Base
from engine.model.device import host_share_gib
from engine.planning.cards import Card, found_card
from engine.planning.compute_plan import ComputePlan
from engine.planning.known_cards import with_known_rates
from engine.planning.planner import make_compute_plan
from engine.shape.model_shape import ModelShape
from engine.units import GIB
from engine.vocabulary.host_embedding import pinned_bytes

CARD_STEP_GIB, HOST_STEP_GIB = 1 / 16, 1.0


def memory_limit_gib(config: TrainConfig, device: torch.device) -> float:
    """Return the device memory in GiB that a trial may have here, context included; infinite on the CPU."""
    return min(_own_gib(device), config.train.memory_budget_gib or math.inf) if device.type == "cuda" else math.inf


def plan_for_this_card(config: TrainConfig, base: Base) -> tuple[ComputePlan, ModelShape | None]:
    """Return the plan for this card, and the model shape it was predicted from, if any."""
    if base.device.type != "cuda":
        return make_compute_plan(config, None, None), None
    card = with_known_rates(found_card(torch.cuda.get_device_name(base.device), _own_gib(base.device)), here=True)
    shape = ModelShape.known(base.model.config.to_dict(), config.model.path) if base.route.is_predicted else None
    if shape is not None and calls_kernels(base.model, FLASH_LINEAR_ATTENTION):
        shape = shape.with_kernels()
    host_gib = host_share_gib(base.stash.memory.num_bytes / GIB) + pinned_bytes(base.model) / GIB
    return _planned(config, shape, card, host_gib), shape


def _planned(config: TrainConfig, shape: ModelShape | None, card: Card, host_gib: float) -> ComputePlan:
    """Return the plan; trials that differ in nothing it depends on share it. It takes 0.1 s, for 8B up to 1 s.

    Memory is rounded down, because it varies a little from trial to trial.
    """
    card = replace(card, memory_gib=_floor(card.memory_gib, CARD_STEP_GIB))
    values = config.model_dump(mode="json")
    values["optim"], values["train"]["seed"], values["lora"]["lora_alpha"] = {"name": config.optim.name}, 0, None
    return _plan_once(json.dumps(values), shape, card, _floor(host_gib, HOST_STEP_GIB))


@functools.lru_cache(maxsize=64)
def _plan_once(values: str, shape: ModelShape | None, card: Card, host_gib: float) -> ComputePlan:
    return make_compute_plan(parse(TrainConfig, json.loads(values)), shape, card, host_gib)


def _floor(gib: float, step: float) -> float:
    return gib if math.isinf(gib) else gib // step * step


def _own_gib(device: torch.device) -> float:
    """Return the GiB of the card that this process can have: another one may hold a part."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return min(free_bytes + torch.cuda.memory_reserved(device) + CONTEXT_GIB * GIB, total_bytes) / GIB
