"""What this process takes of its device's memory, and how it is kept to a part of it."""

from __future__ import annotations

import resource

import torch

from engine.metrics import GIB


def limit_memory(gib: float, device: torch.device) -> None:
    """Let this process have no more than `gib` of a CUDA device; all of it where that is more than there is."""
    index = torch.cuda.current_device() if device.index is None else device.index  # torch limits no device without a number
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total), index)


def peak_gib(device: torch.device) -> float:
    """CUDA: highest bytes allocated by torch; CPU: highest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
