"""Quantise the rows of an activation or a gradient to int8 codes in Triton, with or without a rotation.

A program holds a short row in registers: it reads the row once, takes its largest value and writes
the codes. It takes a long row in pieces, twice: the second time they are in a cache. The rotation
is a product on tensor cores of the row's groups [K / 64, 64] with the Hadamard matrix, which bf16
and fp16 hold exactly.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.eight_bit.card_facts import multiprocessors
from engine.kernels.eight_bit.int8_reference import GROUP, Int8Rows
from engine.kernels.eight_bit.unpacking_parts import code_bits, hadamard_tile

MOST_GROUPS, WIDEST_WHOLE = 64, 512  # in one piece of a row, and in a plain row that is one piece
ALL = 1 << 20  # programs: one for each row
INFINITE_BITS = tl.constexpr(0x7F800000)  # of fp32 infinity; those of NaN are greater


@dataclass(frozen=True)
class RowLaunch:
    """Hold one way to launch: groups of 64 elements at a time, warps, and programs on one multiprocessor."""

    groups: int
    warps: int
    per_processor: int


@triton.jit
def _piece(x, k, K, h, ROTATED: tl.constexpr):
    """Return elements k of a row in fp32, rotated if asked for, and 0 past its end."""
    values = tl.load(x + k, mask=k < K, other=0.0)
    if ROTATED:
        return tl.dot(values, h, input_precision="ieee")
    else:
        return values.to(tl.float32)


@triton.jit
def size_bits(values):
    """Return the bits of |values|: they have the order of the sizes, and those of NaN are above infinity's."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit(do_not_specialize=["T"])  # T changes from batch to batch; its divisors gain nothing
def _rows_kernel(x, codes, scales, x_stride, T, K, ROTATED: tl.constexpr, WHOLE: tl.constexpr, GROUPS: tl.constexpr):
    """Write codes and scales of the rows whose number, modulo the number of programs, is this program's.

    WHOLE: a row is one piece of GROUPS groups. A row that is not finite gets an infinite scale.
    """
    h = hadamard_tile(x.dtype.element_ty)
    k = tl.arange(0, GROUPS)[:, None] * 64 + tl.arange(0, 64)[None, :]
    for number in range(tl.program_id(0), T, tl.num_programs(0)):
        row = tl.full((), number, tl.int64)
        if WHOLE:
            values = _piece(x + row * x_stride, k, K, h, ROTATED)
            sizes = size_bits(values)
        else:
            sizes = tl.zeros((GROUPS, 64), tl.int32)
            for start in range(0, K, GROUPS * 64):
                sizes = tl.maximum(sizes, size_bits(_piece(x + row * x_stride, start + k, K, h, ROTATED)))
        limit = tl.minimum(tl.max(sizes), INFINITE_BITS).to(tl.float32, bitcast=True)
        scale = tl.maximum(limit, 1e-30) * 0.007874015748031496  # SMALLEST_LIMIT and INVERSE
        tl.store(scales + row, scale)
        inverse = tl.div_rn(1.0, scale)
        if WHOLE:
            tl.store(codes + row * K + k, code_bits(values, inverse).to(tl.int8), mask=k < K)
        else:
            for start in range(0, K, GROUPS * 64):
                values = _piece(x + row * x_stride, start + k, K, h, ROTATED)
                tl.store(codes + row * K + start + k, code_bits(values, inverse).to(tl.int8), mask=start + k < K)


def quantize_rows(x_TK: Tensor, is_rotated: bool) -> Int8Rows:
    return launch_rows(x_TK, is_rotated, _choose(x_TK.shape[1], is_rotated))


@functools.cache
def _choose(width: int, is_rotated: bool) -> RowLaunch:
    """Return the launch for a width.

    A rotated row stays whole up to 16,384 elements: to rotate it twice costs more than registers. A
    program takes several, for it makes H once. Plain rows stay whole up to 32,768 elements: one of
    28,672 took 168 us in pieces, whole 128 (H100). Rows in pieces are few enough for the L2 cache.
    """
    groups = triton.next_power_of_2(triton.cdiv(width, GROUP))
    if is_rotated:
        piece = max(16, groups) if groups <= 4 * MOST_GROUPS else MOST_GROUPS  # 16 rows are a matrix instruction's
        return RowLaunch(piece, 4, 2 if piece > MOST_GROUPS else 6)
    if groups <= 2 * MOST_GROUPS:
        return RowLaunch(groups, min(8, max(1, groups // 8)), ALL)
    if groups <= WIDEST_WHOLE:
        return RowLaunch(groups, groups // 32, WIDEST_WHOLE // groups)
    return RowLaunch(MOST_GROUPS, 8, 4)


def launch_rows(x_TK: Tensor, is_rotated: bool, how: RowLaunch) -> Int8Rows:
    """Quantise with the caller's choice of launch (the benchmark's)."""
    num_tokens, width = x_TK.shape
    codes_TK = torch.empty((num_tokens, width), dtype=torch.int8, device=x_TK.device)
    scale_T = torch.empty(num_tokens, dtype=torch.float32, device=x_TK.device)
    if num_tokens:
        programs = min(num_tokens, how.per_processor * multiprocessors(x_TK))
        options = _options(how, width, is_rotated)
        _rows_kernel[(programs,)](x_TK, codes_TK, scale_T, x_TK.stride(0), num_tokens, width, **options)
    return Int8Rows(codes_TK, scale_T)


@functools.cache
def _options(how: RowLaunch, width: int, is_rotated: bool) -> dict[str, object]:
    options = {"ROTATED": is_rotated, "WHOLE": width <= how.groups * GROUP, "GROUPS": how.groups}
    return {**options, "num_warps": how.warps, "enable_fp_fusion": False}
