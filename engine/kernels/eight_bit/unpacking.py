"""Unpack NF4 to int8 codes in Triton: packed bytes and block scales in, codes of W or W^T out.

One weight costs half a byte read and one byte written. A tile holds BLOCK_O rows and BLOCK_D
columns of W. Its values are those of `engine.kernels.nf4` in fp32, so codes without a rotation are
bit-equal to the reference. `rotated_weights` rotates most weights. The rest, whose groups of 64 do
not have one block scale each, are rotated here: bf16 values times the Hadamard matrix, summed in
fp32.

For W^T a thread packs the codes of four rows into one word, because shared memory turns words
faster than bytes. Columns are scaled over all rows of all members, so the scales need a pass of
their own. It runs once for each weight.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.eight_bit.card_facts import multiprocessors
from engine.kernels.eight_bit.int8_reference import GROUP, INVERSE, SMALLEST_LIMIT, WeightScales
from engine.kernels.eight_bit.rotated_weights import rotated_codes_, rotated_limits_, takes
from engine.kernels.eight_bit.unpacking_parts import code_bits, hadamard_tile, nibbles_of
from engine.kernels.nf4_state import Nf4State

WORD = 8  # elements in a loaded word of four bytes
PER_WORD = 4  # codes in a stored word


@dataclass(frozen=True)
class UnpackTile:
    """Hold one way to launch: a tile of rows by columns, warps, and programs on one multiprocessor."""

    rows: int
    columns: int
    warps: int
    per_processor: int


PLAIN = UnpackTile(4, 1024, 2, 1 << 20)
ROTATED = UnpackTile(32, 128, 4, 4)
TRANSPOSED = UnpackTile(128, 64, 4, 1 << 20)
LIMITS = UnpackTile(32, 128, 4, 1 << 20)


@triton.jit
def _values(
    packed, code, absmax, nested_code, nested_absmax, nested_offset, row, column, num_rows, D,
    BLOCK_SIZE: tl.constexpr, NESTED_BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, UNIT: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Return the values of BLOCK_O rows, each STEP below the last, in fp32, and 0 outside the weight.

    UNIT elements come from one load, and SPAN neighbours share one block scale.
    """
    start = row.to(tl.int64) * D + column
    o = tl.arange(0, BLOCK_O)[:, None] * STEP
    exists = o < num_rows - row
    if UNIT == 8:
        word = tl.arange(0, BLOCK_D // 8)[None, :]
        words = tl.load(packed + start // 8 + o * (D // 8) + word, mask=exists & (word * 8 < D - column), other=0)
        nibbles = nibbles_of(words, BLOCK_O * BLOCK_D)
    else:
        d = tl.arange(0, BLOCK_D)[None, :]
        element = start + o * D + d
        byte = tl.load(packed + element // 2, mask=exists & (d < D - column), other=0).to(tl.int32)
        nibbles = ((byte >> (((element & 1) ^ 1) * 4).to(tl.int32)) & 15).reshape(BLOCK_O * BLOCK_D)
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
    values = tl.gather(table, nibbles, 0).reshape(BLOCK_O, BLOCK_D // SPAN, SPAN)
    return (values * scale[:, :, None]).reshape(BLOCK_O, BLOCK_D)


@triton.jit
def _rotate(values, h, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr):
    groups = values.to(tl.bfloat16).reshape(BLOCK_O * BLOCK_D // 64, 64)
    return tl.dot(groups, h).reshape(BLOCK_O, BLOCK_D)


@triton.jit
def _rows_kernel(
    packed, code, absmax, nested_code, nested_absmax, nested_offset, scales, codes, codes_stride, num_rows, D,
    BLOCK_SIZE: tl.constexpr, NESTED_BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, UNIT: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Write the codes of W [O, D], with scales of rows."""
    across = tl.cdiv(D, BLOCK_D)
    h = hadamard_tile(tl.bfloat16)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_O) * across, tl.num_programs(0)):
        row, column = tile // across * BLOCK_O, tile % across * BLOCK_D
        values = _values(
            packed, code, absmax, nested_code, nested_absmax, nested_offset, row, column, num_rows, D,
            BLOCK_SIZE, NESTED_BLOCK_SIZE, NESTED, UNIT, SPAN, BLOCK_O, BLOCK_D, 1,
        )  # fmt: skip
        if ROTATED:
            values = _rotate(values, h, BLOCK_O, BLOCK_D)
        o, d = row + tl.arange(0, BLOCK_O), column + tl.arange(0, BLOCK_D)
        inverse = tl.div_rn(1.0, tl.load(scales + o, mask=o < num_rows, other=1.0))
        place = codes + o.to(tl.int64)[:, None] * codes_stride + d[None, :]
        kept = code_bits(values, inverse[:, None]).to(tl.int8)
        tl.store(place, kept, mask=(o < num_rows)[:, None] & (d < D)[None, :])


@triton.jit
def _columns_kernel(
    packed, code, absmax, nested_code, nested_absmax, nested_offset, scales, codes, codes_stride, num_rows, D,
    BLOCK_SIZE: tl.constexpr, NESTED_BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, UNIT: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Write the codes of W^T [D, O], with scales of columns, in words of STEP codes."""
    across = tl.cdiv(D, BLOCK_D)
    ROWS: tl.constexpr = BLOCK_O // STEP
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_O) * across, tl.num_programs(0)):
        row, column = tile // across * BLOCK_O, tile % across * BLOCK_D
        d = column + tl.arange(0, BLOCK_D)
        inverse = tl.div_rn(1.0, tl.load(scales + d, mask=d < D, other=1.0))
        words = tl.zeros((ROWS, BLOCK_D), tl.int32)
        for i in tl.static_range(STEP):
            values = _values(
                packed, code, absmax, nested_code, nested_absmax, nested_offset, row + i, column, num_rows, D,
                BLOCK_SIZE, NESTED_BLOCK_SIZE, NESTED, UNIT, SPAN, ROWS, BLOCK_D, STEP,
            )  # fmt: skip
            words |= (code_bits(values, inverse[None, :]) & 255) << (8 * i)
        o = row // STEP + tl.arange(0, ROWS)
        place = codes + d.to(tl.int64)[:, None] * codes_stride + o[None, :]
        tl.store(place, tl.trans(words).to(codes.dtype.element_ty), mask=(d < D)[:, None] & (o < num_rows // STEP)[None, :])


@triton.jit
def _limits_kernel(
    packed, code, absmax, nested_code, nested_absmax, nested_offset, row_limits, column_limits, num_rows, D,
    BLOCK_SIZE: tl.constexpr, NESTED_BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, UNIT: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr, WITH_ROWS: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Raise the limits of a tile's columns, and WITH_ROWS of its rows, to its largest |w|.

    They are held as the bits of floats: those that are not negative have the order of their bits.
    A maximum is the same in any order, so the result is deterministic.
    """
    across = tl.cdiv(D, BLOCK_D)
    row, column = tl.program_id(0) // across * BLOCK_O, tl.program_id(0) % across * BLOCK_D
    values = _values(
        packed, code, absmax, nested_code, nested_absmax, nested_offset, row, column, num_rows, D,
        BLOCK_SIZE, NESTED_BLOCK_SIZE, NESTED, UNIT, SPAN, BLOCK_O, BLOCK_D, 1,
    )  # fmt: skip
    values = tl.where(values == values, values, float("inf"))
    o, d = row + tl.arange(0, BLOCK_O), column + tl.arange(0, BLOCK_D)
    tl.atomic_max(column_limits + d, tl.max(tl.abs(values), 0).to(tl.int32, bitcast=True), mask=d < D, sem="relaxed")
    if WITH_ROWS:
        if ROTATED:
            values = _rotate(values, hadamard_tile(tl.bfloat16), BLOCK_O, BLOCK_D)
            values = tl.where(values == values, values, float("inf"))
        tl.atomic_max(row_limits + o, tl.max(tl.abs(values), 1).to(tl.int32, bitcast=True), mask=o < num_rows, sem="relaxed")


def weight_scales(states: Sequence[Nf4State], is_rotated: bool) -> WeightScales:
    device, width = states[0].packed.device, states[0].shape[1]
    rows_O = torch.zeros(sum(state.shape[0] for state in states), dtype=torch.int32, device=device)
    columns_D = torch.zeros(width, dtype=torch.int32, device=device)
    for state, first in _members(states):
        part = rows_O[first : first + state.shape[0]]
        in_groups = is_rotated and takes(state)
        if in_groups:
            rotated_limits_(state, part)
        _launch(_limits_kernel, state, (part, columns_D), LIMITS, WITH_ROWS=not in_groups, ROTATED=is_rotated)
    row_O, column_D = (limits.view(torch.float32).clamp_min(SMALLEST_LIMIT) * INVERSE for limits in (rows_O, columns_D))
    return WeightScales(row_O, column_D, is_rotated)


def unpack_rows_(states: Sequence[Nf4State], scales: WeightScales, codes_OD: Tensor) -> None:
    for state, first in _members(states):
        part = slice(first, first + state.shape[0])
        if scales.is_rotated and takes(state):
            rotated_codes_(state, scales.row_O[part], codes_OD[part])
        else:
            tile = ROTATED if scales.is_rotated else PLAIN
            launch_rows_of_weight(state, scales.row_O[part], codes_OD[part], scales.is_rotated, tile)


def unpack_columns_(states: Sequence[Nf4State], scales: WeightScales, codes_DO: Tensor) -> None:
    for state, first in _members(states):
        launch_columns_of_weight(state, scales.column_D, codes_DO[:, first : first + state.shape[0]], TRANSPOSED)


def launch_rows_of_weight(state: Nf4State, scales_O: Tensor, codes_OD: Tensor, is_rotated: bool, tile: UnpackTile) -> None:
    """Write the codes of W with the caller's choice of tile (the benchmark's)."""
    _launch(_rows_kernel, state, (scales_O, codes_OD, codes_OD.stride(0)), tile, ROTATED=is_rotated)


def launch_columns_of_weight(state: Nf4State, scales_D: Tensor, codes_DO: Tensor, tile: UnpackTile) -> None:
    """Write the codes of W^T with the caller's choice of tile (the benchmark's)."""
    sizes = codes_DO.shape[1], codes_DO.stride(0), codes_DO.storage_offset(), codes_DO.data_ptr()
    step = 1 if any(size % PER_WORD for size in sizes) else PER_WORD
    if step > 1:
        codes_DO = codes_DO.view(torch.int32)
    _launch(_columns_kernel, state, (scales_D, codes_DO, codes_DO.stride(0)), tile, STEP=step)


def _members(states: Sequence[Nf4State]) -> list[tuple[Nf4State, int]]:
    """Return each weight with its first row among those of all."""
    firsts = [0]
    for state in states:
        firsts.append(firsts[-1] + state.shape[0])
    return list(zip(states, firsts))


def _launch(kernel: object, state: Nf4State, given: tuple[object, ...], tile: UnpackTile, **own: object) -> None:
    (rows, width), packed, nested = state.shape, state.packed, state.nested_code is not None
    if not rows * width:
        return
    in_words = width % WORD == 0 and packed.numel() % 4 == 0 and packed.data_ptr() % 4 == 0 and packed.storage_offset() % 4 == 0
    sizes = state.block_size, state.nested_block_size, nested, in_words
    programs, options = _options(tile, multiprocessors(packed), rows, width, *sizes)
    kernel[(programs,)](
        packed.view(torch.int32) if in_words else packed, state.code, state.absmax_M, state.nested_code,
        state.nested_absmax_S, state.nested_offset, *given, rows, width, **options, **own,
    )  # fmt: skip


@functools.lru_cache(4096)
def _options(
    tile: UnpackTile, processors: int, rows: int, width: int, block: int, nested_block: int, nested: bool, in_words: bool
) -> tuple[int, dict[str, object]]:
    """Return the number of programs and the launch options.

    Cached, because a step asks for the same few hundreds of times. A tile is no wider than the row
    needs; it then holds more rows instead.
    """
    block_d = max(GROUP, min(tile.columns, triton.next_power_of_2(width)))
    block_o, unit = tile.rows * tile.columns // block_d, WORD if in_words else 1
    options = {
        "BLOCK_SIZE": block, "NESTED_BLOCK_SIZE": nested_block, "NESTED": nested, "UNIT": unit,
        "SPAN": min(block, block_d) if width % block == 0 else unit, "BLOCK_O": block_o, "BLOCK_D": block_d,
        "num_warps": tile.warps, "enable_fp_fusion": False,
    }  # fmt: skip
    tiles = triton.cdiv(rows, block_o) * triton.cdiv(width, block_d)
    return min(tiles, tile.per_processor * processors), options
