"""Tell what launches need to know of the card that holds a tensor."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def capability(tensor: Tensor) -> int:
    """Return the card's compute capability as 10 * major + minor, 0 on the CPU."""
    return _properties(tensor.device.index)[0] if tensor.is_cuda else 0


def multiprocessors(tensor: Tensor) -> int:
    """Return the number of the card's multiprocessors, 1 on the CPU."""
    return _properties(tensor.device.index)[1] if tensor.is_cuda else 1


@functools.cache
def _properties(device: int) -> tuple[int, int]:
    found = torch.cuda.get_device_properties(device)
    return 10 * found.major + found.minor, found.multi_processor_count
