"""Put weights and biases of several layers side by side, and multiply what lies so.

Shape letters: D input features, O output features.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from engine.quant.frozen_linear import FrozenLinear


def merged_weight(bases: list[FrozenLinear], dtype: torch.dtype, factors_O: Tensor | None = None) -> Tensor:
    """Return the dequantised weights of packed layers with one input, side by side, [O, D]; rows times their factors."""
    parts = slices(*(base.out_features for base in bases))
    merged_OD = torch.empty(parts[-1].stop, bases[0].in_features, dtype=dtype, device=bases[0].weight.device)
    for part, base in zip(parts, bases):
        if factors_O is None:
            base.dequantized(dtype, out=merged_OD[part])
        else:
            base.scaled(factors_O[part], dtype, out=merged_OD[part])
    return merged_OD


@functools.cache
def slices(*sizes: int) -> list[slice]:
    """Return consecutive slices of these sizes.

    Cached, because a step asks for the same few hundreds of times.
    """
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes)]


def stacked(matrices: list[Tensor]) -> Tensor:
    """Return the matrices one below the other.

    The result is a view if they follow each other in memory, as `FlatAdapter` lays them out. Else
    it is a copy.
    """
    first = matrices[0]
    if len(matrices) == 1:
        return first
    place, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for matrix in matrices:
        if matrix.untyped_storage().data_ptr() != storage or matrix.storage_offset() != place or not matrix.is_contiguous():
            return torch.cat(matrices)
        place += matrix.numel()
    return first.as_strided((sum(m.shape[0] for m in matrices), first.shape[1]), first.stride())


def merged_bias(biases: list[Tensor | None], outputs: list[slice], x: Tensor) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    zeros = [x.new_zeros(part.stop - part.start) if bias is None else bias.to(x.dtype) for part, bias in zip(outputs, biases)]
    return zeros[0] if len(zeros) == 1 else torch.cat(zeros)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b; 16-bit operands on CUDA give fp32.

    The product is added into an fp32 gradient, so this saves a rounding and a launch.
    """
    wide = a.is_cuda and a.dtype in (torch.bfloat16, torch.float16)
    return torch.mm(a, b, out_dtype=torch.float32) if wide else a @ b
