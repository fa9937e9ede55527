"""Make the compute plan of a trial for this machine's card."""

from __future__ import annotations

import math

import torch

from engine.config.trial import TrainConfig
from engine.layers.library_kernels import FLASH_LINEAR_ATTENTION, calls_kernels
from engine.memory.prediction import CONTEXT_GIB
from engine.model.base import Base
from engine.model.device import host_share_gib
from engine.planning.cards import found_card
from engine.planning.compute_plan import ComputePlan
from engine.planning.planner import make_compute_plan
from engine.shape.model_shape import ModelShape
from engine.units import GIB
from engine.vocabulary.host_embedding import pinned_bytes


def memory_limit_gib(config: TrainConfig, device: torch.device) -> float:
    """Return the device memory in GiB that a trial may have here, context included; infinite on the CPU."""
    return min(_own_gib(device), config.train.memory_budget_gib or math.inf) if device.type == "cuda" else math.inf


def plan_for_this_card(config: TrainConfig, base: Base) -> tuple[ComputePlan, ModelShape | None]:
    """Return the plan for this card, and the model shape it was predicted from, if any."""
    if base.device.type != "cuda":
        return make_compute_plan(config, None, None), None
    card = found_card(torch.cuda.get_device_name(base.device), _own_gib(base.device))
    shape = ModelShape.known(base.model.config.to_dict(), config.model.path) if base.route.is_predicted else None
    if shape is not None and calls_kernels(base.model, FLASH_LINEAR_ATTENTION):
        shape = shape.with_kernels()
    return make_compute_plan(config, shape, card, host_share_gib() + pinned_bytes(base.model) / GIB), shape


def _own_gib(device: torch.device) -> float:
    """Return the GiB of the card that this process can have: another one may hold a part."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return min(free_bytes + torch.cuda.memory_reserved(device) + CONTEXT_GIB * GIB, total_bytes) / GIB
