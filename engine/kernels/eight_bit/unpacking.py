"""Unpack NF4 to int8 codes in Triton: packed bytes and block scales in, codes of W or W^T out.

One weight costs half a byte read and one byte written. A tile holds BLOCK_O rows and BLOCK_D
columns of W. Its values are those of `engine.kernels.nf4` in fp32, so codes without a rotation are
bit-equal to the reference. The rotation is a product on tensor cores: bf16 values times the
Hadamard matrix, which is exact in bf16, summed in fp32.

Columns are scaled over all rows of all members, so the scales need a pass of their own. It runs
once for each weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.eight_bit.int8_reference import GROUP, LARGEST, SMALLEST_LIMIT, WeightScales
from engine.kernels.nf4_state import Nf4State

TILE, NUM_WARPS = (32, 128), 4
TILE_TRANSPOSED, NUM_WARPS_TRANSPOSED = (128, 64), 4
WORD = 8  # elements in a loaded word of four bytes


@triton.jit
def to_codes(x):
    """Return x rounded to nearest even, int8; x is at most 127 in size after a clamp.

    Adding 1.5 * 2^23 leaves the rounded integer in the low bits of the float.
    """
    shifted = tl.minimum(tl.maximum(x, -127.0), 127.0) + 12582912.0
    return shifted.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def hadamard_tile(dtype: tl.constexpr):
    """Return H [64, 64]: element i, j is 1/8, negative if i & j has an odd number of ones."""
    both = tl.arange(0, 64)[:, None] & tl.arange(0, 64)[None, :]
    both = both ^ (both >> 4)
    both = both ^ (both >> 2)
    both = both ^ (both >> 1)
    return (0.125 - 0.25 * (both & 1).to(tl.float32)).to(dtype)


@triton.jit
def _values(
    packed, code, absmax, nested_code, nested_absmax, nested_offset, row, column, num_rows, D,
    BLOCK_SIZE: tl.constexpr, NESTED_BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, UNIT: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return the values of one tile in fp32, and 0 outside the weight.

    UNIT elements come from one load, and SPAN neighbours share one block scale.
    """
    start = row.to(tl.int64) * D + column
    o = tl.arange(0, BLOCK_O)[:, None]
    exists = o < num_rows - row
    if UNIT == 8:
        word = tl.arange(0, BLOCK_D // 8)[None, :]
        words = tl.load(packed + start // 8 + o * (D // 8) + word, mask=exists & (word * 8 < D - column), other=0)
        i = tl.arange(0, 8)
        # Little-endian word, high nibble first: element i of a word starts at bit 4, 0, 12, 8, ...
        nibbles = (words[:, :, None] >> ((i ^ 1) * 4)[None, None, :]) & 15
    else:
        d = tl.arange(0, BLOCK_D)[None, :]
        element = start + o * D + d
        byte = tl.load(packed + element // 2, mask=exists & (d < D - column), other=0).to(tl.int32)
        nibbles = (byte >> (((element & 1) ^ 1) * 4).to(tl.int32)) & 15
    span = tl.arange(0, BLOCK_D // SPAN)[None, :] * SPAN
    block = (start + o * D + span) // BLOCK_SIZE
    inside = exists & (span < D - column)
    scale = tl.load(absmax + block, mask=inside, other=0)
    if NESTED:
        nested_scale = tl.load(nested_absmax + block // NESTED_BLOCK_SIZE, mask=inside, other=0.0)
        scale = tl.load(nested_code + scale.to(tl.int32)) * nested_scale
        scale = scale + tl.load(nested_offset)
    scale = tl.where(inside, scale, 0.0)
    table = tl.load(code + tl.arange(0, 16))
    values = tl.gather(table, nibbles.reshape(BLOCK_O * BLOCK_D), 0).reshape(BLOCK_O, BLOCK_D // SPAN, SPAN)
    return (values * scale[:, :, None]).reshape(BLOCK_O, BLOCK_D)


@triton.jit
def _rotate(values, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr):
    groups = values.to(tl.bfloat16).reshape(BLOCK_O * BLOCK_D // 64, 64)
    return tl.dot(groups, hadamard_tile(tl.bfloat16)).reshape(BLOCK_O, BLOCK_D)


@triton.jit
def _unpack_kernel(
    packed, code, absmax, nested_code, nested_absmax, nested_offset, scales, codes, codes_stride, num_rows, D,
    BLOCK_SIZE: tl.constexpr, NESTED_BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, UNIT: tl.constexpr, SPAN: tl.constexpr,
    ROTATED: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the codes of one tile: to [O, D] with scales of rows, or to [D, O] with scales of columns."""
    across = tl.cdiv(D, BLOCK_D)
    row, column = tl.program_id(0) // across * BLOCK_O, tl.program_id(0) % across * BLOCK_D
    values = _values(
        packed, code, absmax, nested_code, nested_absmax, nested_offset, row, column, num_rows, D,
        BLOCK_SIZE, NESTED_BLOCK_SIZE, NESTED, UNIT, SPAN, BLOCK_O, BLOCK_D,
    )  # fmt: skip
    o, d = row + tl.arange(0, BLOCK_O), column + tl.arange(0, BLOCK_D)
    if TRANSPOSED:
        inverse = tl.div_rn(1.0, tl.load(scales + d, mask=d < D, other=1.0))
        kept = tl.trans(to_codes(values * inverse[None, :]))
        place = codes + d.to(tl.int64)[:, None] * codes_stride + o[None, :]
        tl.store(place, kept, mask=(d < D)[:, None] & (o < num_rows)[None, :])
    else:
        if ROTATED:
            values = _rotate(values, BLOCK_O, BLOCK_D)
        inverse = tl.div_rn(1.0, tl.load(scales + o, mask=o < num_rows, other=1.0))
        place = codes + o.to(tl.int64)[:, None] * codes_stride + d[None, :]
        tl.store(place, to_codes(values * inverse[:, None]), mask=(o < num_rows)[:, None] & (d < D)[None, :])


@triton.jit
def _limits_kernel(
    packed, code, absmax, nested_code, nested_absmax, nested_offset, row_limits, column_limits, num_rows, D,
    BLOCK_SIZE: tl.constexpr, NESTED_BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, UNIT: tl.constexpr, SPAN: tl.constexpr,
    ROTATED: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Raise the limits of a tile's rows and columns to its largest |w|.

    They are held as the bits of floats: those that are not negative have the order of their bits.
    A maximum is the same in any order, so the result is deterministic.
    """
    across = tl.cdiv(D, BLOCK_D)
    row, column = tl.program_id(0) // across * BLOCK_O, tl.program_id(0) % across * BLOCK_D
    values = _values(
        packed, code, absmax, nested_code, nested_absmax, nested_offset, row, column, num_rows, D,
        BLOCK_SIZE, NESTED_BLOCK_SIZE, NESTED, UNIT, SPAN, BLOCK_O, BLOCK_D,
    )  # fmt: skip
    values = tl.where(values == values, values, float("inf"))
    o, d = row + tl.arange(0, BLOCK_O), column + tl.arange(0, BLOCK_D)
    tl.atomic_max(column_limits + d, tl.max(tl.abs(values), 0).to(tl.int32, bitcast=True), mask=d < D, sem="relaxed")
    if ROTATED:
        values = _rotate(values, BLOCK_O, BLOCK_D)
        values = tl.where(values == values, values, float("inf"))
    tl.atomic_max(row_limits + o, tl.max(tl.abs(values), 1).to(tl.int32, bitcast=True), mask=o < num_rows, sem="relaxed")


def weight_scales(states: Sequence[Nf4State], is_rotated: bool) -> WeightScales:
    device, width = states[0].packed.device, states[0].shape[1]
    rows_O = torch.zeros(sum(state.shape[0] for state in states), dtype=torch.int32, device=device)
    columns_D, first = torch.zeros(width, dtype=torch.int32, device=device), 0
    for state in states:
        part = rows_O[first : first + state.shape[0]]
        _launch(_limits_kernel, state, (part, columns_D), TILE, ROTATED=is_rotated, num_warps=NUM_WARPS)
        first += state.shape[0]
    row_O, column_D = (limits.view(torch.float32).clamp_min(SMALLEST_LIMIT) / LARGEST for limits in (rows_O, columns_D))
    return WeightScales(row_O, column_D, is_rotated)


def unpack_rows_(states: Sequence[Nf4State], scales: WeightScales, codes_OD: Tensor) -> None:
    for state, first in _members(states):
        part = slice(first, first + state.shape[0])
        launch_unpack(state, scales.row_O[part], codes_OD[part], scales.is_rotated, False, TILE, NUM_WARPS)


def unpack_columns_(states: Sequence[Nf4State], scales: WeightScales, codes_DO: Tensor) -> None:
    for state, first in _members(states):
        part = codes_DO[:, first : first + state.shape[0]]
        launch_unpack(state, scales.column_D, part, False, True, TILE_TRANSPOSED, NUM_WARPS_TRANSPOSED)


def launch_unpack(
    state: Nf4State, scales: Tensor, codes: Tensor, is_rotated: bool, transposed: bool, tile: tuple[int, int], num_warps: int
) -> None:
    """Write the codes of one weight with the caller's choice of tile and warps (the benchmark's)."""
    given = (scales, codes, codes.stride(0))
    _launch(_unpack_kernel, state, given, tile, ROTATED=is_rotated, TRANSPOSED=transposed, num_warps=num_warps)


def _members(states: Sequence[Nf4State]) -> list[tuple[Nf4State, int]]:
    """Return each weight with its first row among those of all."""
    firsts = [0]
    for state in states:
        firsts.append(firsts[-1] + state.shape[0])
    return list(zip(states, firsts))


def _launch(kernel: object, state: Nf4State, given: tuple[object, ...], tile: tuple[int, int], **options: object) -> None:
    (rows, width), packed = state.shape, state.packed
    if not rows * width:
        return
    unit, block_d = 1, max(GROUP, min(tile[1], triton.next_power_of_2(width)))
    if width % WORD == 0 and packed.numel() % 4 == 0 and packed.data_ptr() % 4 == 0 and packed.storage_offset() % 4 == 0:
        packed, unit = packed.view(torch.int32), WORD
    span = min(state.block_size, block_d) if width % state.block_size == 0 else unit
    grid = (triton.cdiv(rows, tile[0]) * triton.cdiv(width, block_d),)
    kernel[grid](
        packed, state.code, state.absmax_M, state.nested_code, state.nested_absmax_S, state.nested_offset, *given, rows, width,
        BLOCK_SIZE=state.block_size, NESTED_BLOCK_SIZE=state.nested_block_size, NESTED=state.nested_code is not None,
        UNIT=unit, SPAN=span, BLOCK_O=tile[0], BLOCK_D=block_d, enable_fp_fusion=False, **options,
    )  # fmt: skip
