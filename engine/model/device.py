"""The device a trial runs on, and what this process takes or may take of its memory and the host's."""

from __future__ import annotations

import gc
import math
import re
import resource
from pathlib import Path

import torch

from engine.errors import InputError
from engine.units import GIB

HOST_SHARE = 0.7  # of the memory that is available when a trial starts; the rest is for data, page cache and the driver


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


def host_share_gib(meminfo: Path = Path("/proc/meminfo"), devices: Path = Path("/dev")) -> float:
    """Host memory one process may pin: an equal part for each GPU of this machine. Not known (no /proc): all."""
    try:
        available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf
    num_gpus = len([d for d in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", d.name)])
    return HOST_SHARE * int(available.split()[1]) / 2**20 / max(1, num_gpus)


def pick_device(wanted: str) -> torch.device:
    """`auto` is CUDA where there is one. Asking for CUDA without one is an InputError."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device", wanted, "no CUDA device is visible; allowed here: auto, cpu")
    return torch.device("cpu" if wanted == "cpu" or not torch.cuda.is_available() else "cuda")


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA, float32 on the CPU, unless told otherwise."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[wanted]


def free(device: torch.device) -> None:
    """Give memory of dropped tensors back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
