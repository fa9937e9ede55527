"""Drop elements, or add noise to them, by a hash of where they are: no generator state, no mask in memory.

The seed is read from the device, so a CUDA graph that is replayed with another seed has another
mask. `reference.dropout` and `reference.add_noise_` define the hash.

Shape letters: T tokens, D features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_D = 1024


@triton.jit
def _mix(h):
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h *= 0x846CA68B
    h ^= h >> 16
    return h


@triton.jit
def _hash(noise, stream, row, columns):
    seed = tl.load(noise)
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    key = _mix(_mix(_mix(low) + high) + stream.to(tl.uint32))
    row_key = _mix(key + row.to(tl.uint32))
    return _mix(_mix(columns.to(tl.uint32) + row_key) ^ _mix(key ^ 0x9E3779B9))


@triton.jit(do_not_specialize=["stream"])
def _noise_kernel(x, bound, noise, stream, x_stride, D, BLOCK_D: tl.constexpr):
    blocks_per_row = tl.cdiv(D, BLOCK_D)
    row = tl.program_id(0) // blocks_per_row
    columns = (tl.program_id(0) % blocks_per_row) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    h = _hash(noise, stream, row, columns)
    share = ((h >> 9).to(tl.float32) + 0.5) * 2.384185791015625e-07 - 1.0
    place = x + row.to(tl.int64) * x_stride + columns
    values = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, (values + share * tl.load(bound + row)).to(x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["stream"])
def _dropout_kernel(x, y, noise, stream, x_stride, y_stride, D, BLOCK_D: tl.constexpr):
    blocks_per_row = tl.cdiv(D, BLOCK_D)
    row = tl.program_id(0) // blocks_per_row
    columns = (tl.program_id(0) % blocks_per_row) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    threshold = tl.load(noise + 1)
    h = _hash(noise, stream, row, columns)
    scale = tl.div_rn(4294967296.0, 4294967296.0 - threshold.to(tl.float32))
    values = tl.load(x + row.to(tl.int64) * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    kept = tl.where(h >= threshold.to(tl.uint32), values * scale, 0.0)
    tl.store(y + row.to(tl.int64) * y_stride + columns, kept.to(y.dtype.element_ty), mask=inside)


def dropout(x_TD: Tensor, noise: Tensor, stream: int, in_place: bool = False) -> Tensor:
    num_rows, width = x_TD.shape
    y_TD = x_TD if in_place else torch.empty(num_rows, width, dtype=x_TD.dtype, device=x_TD.device)
    if num_rows and width:
        grid = (num_rows * triton.cdiv(width, BLOCK_D),)
        _dropout_kernel[grid](x_TD, y_TD, noise, stream, x_TD.stride(0), y_TD.stride(0), width, BLOCK_D=BLOCK_D, num_warps=4)
    return y_TD


def add_noise_(x_TD: Tensor, bound_T: Tensor, noise: Tensor, stream: int) -> None:
    num_rows, width = x_TD.shape
    if num_rows and width:
        grid = (num_rows * triton.cdiv(width, BLOCK_D),)
        _noise_kernel[grid](x_TD, bound_T, noise, stream, x_TD.stride(0), width, BLOCK_D=BLOCK_D, num_warps=4)
