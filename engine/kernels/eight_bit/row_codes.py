"""Quantise the rows of an activation or a gradient to int8 codes in Triton, with or without a rotation.

One program holds a whole row in registers: it reads the row once, takes its largest value and
writes the codes. The rotation is a product on tensor cores of the row's groups [K / 64, 64] with
the Hadamard matrix, which bf16 and fp16 hold exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.eight_bit.int8_reference import GROUP, Int8Rows
from engine.kernels.eight_bit.unpacking import hadamard_tile, to_codes

PER_THREAD = 32  # elements of a row


@triton.jit
def _rows_kernel(x, codes, scales, x_stride, K, ROTATED: tl.constexpr, GROUPS: tl.constexpr):
    """Write one row's codes and its scale.

    A row that is not finite gets zeros and an infinite scale, whose product is NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, GROUPS)[:, None] * 64 + tl.arange(0, 64)[None, :]
    values = tl.load(x + row * x_stride + k, mask=k < K, other=0.0)
    if ROTATED:
        values = tl.dot(values, hadamard_tile(values.dtype), input_precision="ieee")
    else:
        values = values.to(tl.float32)
    size = tl.abs(values)
    is_finite = size < float("inf")
    limit = tl.max(tl.max(tl.where(is_finite, size, float("inf")), 1), 0)
    scale = tl.div_rn(tl.maximum(limit, 1e-30), 127.0)
    tl.store(scales + row, scale)
    kept = to_codes(tl.where(is_finite, values, 0.0) * tl.div_rn(1.0, scale))
    tl.store(codes + row * K + k, kept, mask=k < K)


def quantize_rows(x_TK: Tensor, is_rotated: bool) -> Int8Rows:
    width = x_TK.shape[1]
    least = 16 if is_rotated else 1  # rows of a matrix instruction
    groups = max(least, triton.next_power_of_2(triton.cdiv(width, GROUP)))
    return launch_rows(x_TK, is_rotated, groups, min(16, max(1 if not is_rotated else 4, groups * GROUP // (32 * PER_THREAD))))


def launch_rows(x_TK: Tensor, is_rotated: bool, groups: int, num_warps: int) -> Int8Rows:
    """Quantise with the caller's number of warps (the benchmark's)."""
    num_tokens, width = x_TK.shape
    codes_TK = torch.empty((num_tokens, width), dtype=torch.int8, device=x_TK.device)
    scale_T = torch.empty(num_tokens, dtype=torch.float32, device=x_TK.device)
    if num_tokens:
        _rows_kernel[(num_tokens,)](
            x_TK, codes_TK, scale_T, x_TK.stride(0), width, ROTATED=is_rotated, GROUPS=groups, num_warps=num_warps,
            enable_fp_fusion=False,
        )  # fmt: skip
    return Int8Rows(codes_TK, scale_T)
