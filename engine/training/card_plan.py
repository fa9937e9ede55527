"""Make the compute plans of a trial for this machine's card."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from engine.config.parsing import parse
from engine.config.trial import ModelConfig, TrainConfig
from engine.kernels.eight_bit.int8_tiles import USES, Tile, use_tiles
from engine.layers.library.library_kernels import FLASH_LINEAR_ATTENTION, calls_kernels
from engine.memory.prediction import CONTEXT_GIB
from engine.model.base import Base
from engine.model.device import host_share_gib
from engine.model.library_layers import with_library_bytes
from engine.planning.cards import Card, found_card
from engine.planning.compute_plan import ComputePlan
from engine.planning.known_cards import measured_here, with_known_rates
from engine.planning.ladder import leaner
from engine.planning.memory_limit import Lessons, Validity
from engine.planning.planner import allowed_gib, changed, make_compute_plan
from engine.shape.model_shape import ModelShape
from engine.units import GIB
from engine.vocabulary.host_embedding import pinned_bytes

CARD_STEP_GIB, HOST_STEP_GIB = 1 / 16, 1.0


def memory_limit_gib(config: TrainConfig, device: torch.device) -> float:
    """Return the device memory in GiB that a trial may have here, context included; infinite on the CPU."""
    return min(_own_gib(device), config.train.memory_budget_gib or math.inf) if device.type == "cuda" else math.inf


@dataclass(frozen=True)
class CardPlanner:
    """Make the plans of one trial; shape and card are None if nothing can be predicted.

    card: with the memory that this process may have of it. lessons: the base model's, because a
    worker lends it to trial after trial.
    """

    config: TrainConfig
    shape: ModelShape | None = None
    card: Card | None = None
    host_gib: float = math.inf
    lessons: Lessons = field(default_factory=Lessons)

    @classmethod
    def here(cls, config: TrainConfig, base: Base) -> CardPlanner:
        """Return the planner for the card that `base` is on."""
        if base.device.type != "cuda":
            return cls(config)
        card = base.lasting.get("card")  # its rates are looked up once for each base: versions and files are read for that
        if card is None:
            name = torch.cuda.get_device_name(base.device)
            card = base.lasting["card"] = with_known_rates(found_card(name, _own_gib(base.device)), here=True)
            _use_own_tiles(name, torch.cuda.get_device_capability(base.device))
        card = replace(card, memory_gib=_own_gib(base.device))
        shape = ModelShape.known(base.model.config.to_dict(), config.model.path) if base.route.is_predicted else None
        if shape is not None and calls_kernels(base.model, FLASH_LINEAR_ATTENTION):
            shape = shape.with_kernels(recordable=base.pads_rows(config.data.max_seq_length))
        shape = shape and _with_library_bytes(shape, config.model, base)
        host_gib = host_share_gib(base.stash.memory.num_bytes / GIB) + pinned_bytes(base.model) / GIB
        return cls(config, shape, card, host_gib, base.lasting.setdefault("lessons", Lessons()))

    def fastest(self) -> ComputePlan:
        """Return the fastest plan that fits; raise OutOfMemory if none does.

        Trials that differ in nothing a plan depends on share it, because it takes 0.1 s, for 8B up to
        1 s. Memory is rounded down. It varies from trial to trial, and mostly decides nothing.
        """
        if self.card is None:
            return make_compute_plan(self.config, self.shape, None)
        memory_gib, host_gib = _floor(self.card.memory_gib, CARD_STEP_GIB), _floor(self.host_gib, HOST_STEP_GIB)
        card = replace(self.card, memory_gib=memory_gib)
        values = self.config.model_dump(mode="json")
        averaged = None if self.config.optim.ema_horizon is None else 1.0  # it takes memory, whatever its horizon
        values["optim"] = {"name": self.config.optim.name, "ema_horizon": averaged}
        values["train"]["seed"], values["lora"]["lora_alpha"] = 0, None
        learnt = tuple(self.lessons.factors.items())
        known = _plans(json.dumps(values), self.shape, replace(card, memory_gib=0.0), learnt)
        allowed = allowed_gib(self.config, card)
        plan = next((plan for plan, validity in known if validity.holds(allowed, host_gib)), None)
        if plan is None:
            config, validity, lessons = parse(TrainConfig, values), Validity(), Lessons(dict(learnt))
            plan = make_compute_plan(config, self.shape, card, host_gib, lessons=lessons, validity=validity)
            known.append((plan, validity))
        return plan

    def changed(self, plan: ComputePlan, settings: dict[str, Any]) -> ComputePlan:
        """Return the plan with other settings of `train`."""
        return changed(plan, settings, self.config, self.shape)

    def leaner(self, failed: ComputePlan, reserved_gib: float) -> ComputePlan | None:
        """Return the plan to try after one ran out of memory. reserved_gib: the most that torch held."""
        had_gib = reserved_gib + CONTEXT_GIB
        return leaner(failed, self.config, self.shape, self.card, self.host_gib, lessons=self.lessons, had_gib=had_gib)


def _with_library_bytes(shape: ModelShape, config: ModelConfig, base: Base) -> ModelShape:
    """Return the shape with what the library's layers allocate, which is measured once for each base."""
    if "library" not in base.lasting:

        def make(small: Any, attention_name: str) -> nn.Module:
            return type(base.model)._from_config(small, attn_implementation=attention_name)

        base.lasting["library"] = with_library_bytes(shape, config, base.model.config, make).library
    return replace(shape, library=base.lasting["library"])


@functools.lru_cache(maxsize=64)
def _plans(values: str, shape: ModelShape | None, card: Card, learnt: tuple[Any, ...]) -> list[tuple[ComputePlan, Validity]]:
    """Return the plans made so far of such a config on such a card, with the memory for which each holds. Callers add more."""
    return []


def _floor(gib: float, step: float) -> float:
    return gib if math.isinf(gib) else gib // step * step


def _use_own_tiles(name: str, capability: tuple[int, int]) -> None:
    """Let products in INT8 take the tiles that the card's own measurement found to be the fastest."""
    own = measured_here(name)
    tiles = {} if own is None else {use: Tile(**sizes) for use, sizes in own.tiles.items() if use in USES}
    use_tiles(10 * capability[0] + capability[1], tiles)


def _own_gib(device: torch.device) -> float:
    """Return the GiB of the card that this process can have: another one may hold a part."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return min(free_bytes + torch.cuda.memory_reserved(device) + CONTEXT_GIB * GIB, total_bytes) / GIB
