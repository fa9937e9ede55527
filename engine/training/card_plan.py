"""Make the compute plan of a trial for this machine's card."""

from __future__ import annotations

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


def plan_for_this_card(config: TrainConfig, base: Base) -> tuple[ComputePlan, ModelShape | None]:
    """Return the plan for this card, and the model shape it was predicted from, if any."""
    if base.device.type != "cuda":
        return make_compute_plan(config, None, None), None
    free_bytes, total_bytes = torch.cuda.mem_get_info(base.device)
    # Another process may hold a part of the card, so the plan counts only what this one can have.
    ours = free_bytes + torch.cuda.memory_reserved(base.device) + CONTEXT_GIB * GIB
    card = found_card(torch.cuda.get_device_name(base.device), min(ours, total_bytes) / GIB)
    shape = ModelShape.known(base.model.config.to_dict(), config.model.path) if base.route.is_predicted else None
    if shape is not None and calls_kernels(base.model, FLASH_LINEAR_ATTENTION):
        shape = shape.with_kernels()
    return make_compute_plan(config, shape, card, host_share_gib() + pinned_bytes(base.model) / GIB), shape
