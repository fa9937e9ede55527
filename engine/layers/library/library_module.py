"""Hold a module of a library that a fused layer calls, and what of it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from engine.adapter.lora import LoraLinear
from engine.quant.frozen_experts import FrozenExperts


@dataclass
class LibraryModule:
    """Hold a module whose linear layers, and experts, may be adapted."""

    module: nn.Module

    @property
    def adapters(self) -> list[nn.Parameter]:
        """Return what is trained of each of its linear layers that is adapted, then of its experts."""
        linears = [parameter for layer in self.adapted() for parameter in layer.parameters_of()]
        experts = [layer for one in self.experts() for layer in one.adapters.values()]
        return linears + [parameter for layer in experts for parameter in (layer.lora_a, layer.lora_b)]

    def new_seed(self) -> int | None:
        """Return a seed for the dropout of one pass and its recomputation; None if none is needed.

        The masks of a `FlatAdapter` are those of its pass. A recording reads them from the device.
        """
        drawing = [layer for layer in self.adapted() if layer.dropout and layer.training]
        for layer in drawing:
            layer.masks_of_pass = layer.noise is not None
        draws = any(layer.noise is None for layer in drawing)
        return int(torch.randint(2**62, ())) if draws else None  # from the CPU generator, so the host does not wait

    def adapted(self) -> list[LoraLinear]:
        return [layer for layer in self.module.modules() if isinstance(layer, LoraLinear)]

    def experts(self) -> list[FrozenExperts]:
        return [module for module in self.module.modules() if isinstance(module, FrozenExperts)]


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw random numbers from `seed`, and leave the generators as they were. With None it does nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
