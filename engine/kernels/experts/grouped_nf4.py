"""Multiply rows sorted by expert with NF4 weights in Triton: each tile dequantises what it reads.

No weight is ever written in 16 bits. A launch has a program for each tile that could exist: at most
S / ROWS + E + 1 row tiles. Each finds its expert from `ends` by itself, so the host never waits. Rows
behind the last expert's end form one more group, which gets zeros.

A weight tile is the same for y = x W^T and for dx = dy W: rows of O, whole blocks of 64 along D. Its
values are code * absmax in fp32, rounded once to the rows' dtype, as the dequantised weight would be.

Shape letters: S rows, E experts, O output features, D input features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.experts.packed_experts import BLOCK
from engine.kernels.nf4_state import Nf4State


@dataclass(frozen=True)
class ExpertTile:
    """One way to cut a product: rows, features of the result, features of the sum; warps and stages of a program.

    swapped: the forward product is computed transposed, with the weights as the operand that tensor
    cores read from registers.
    """

    rows: int
    features: int
    depth: int
    warps: int
    stages: int
    swapped: bool = False


# H100, 16,384 rows of 128 experts, 1536 x 2048: 1.14 ms forward, 1.16 back; 128 rows a tile: 1.36 back.
FORWARD = BACKWARD = ExpertTile(64, 128, 64, 4, 3)
TERMS = ExpertTile(64, 128, 0, 4, 1)
SMALL_ROWS, SMALL_DEPTH = 64, 128
OUTER_FEATURES, OUTER_ROWS = 128, 64
COMBINED = 1024  # features of a sum over a token's rows


@triton.jit
def _find(ends, S, E, program, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Return the expert of a row tile (E for the rest, E + 1 behind all), its first row and the end of its rows."""
    e = tl.arange(0, GROUPS)
    end = tl.load(ends + e, mask=e < E, other=0)
    end = tl.where(e == E, S, end)
    start = tl.load(ends + e - 1, mask=(e > 0) & (e <= E), other=0)
    count = tl.where(e <= E, end - start, 0)
    tiles = (count + ROWS - 1) // ROWS
    last = tl.cumsum(tiles, 0)
    expert = tl.sum((last <= program).to(tl.int32) * (e <= E).to(tl.int32), 0)
    mine = e == expert
    first_tile = tl.sum(tl.where(mine, last - tiles, 0), 0)
    first_row = tl.sum(tl.where(mine, start, 0), 0) + (program - first_tile) * ROWS
    return expert, first_row, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def _weights(
    packed, code, absmax, nested_code, nested_absmax, nested_offset, expert, o, d, OUT, D,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, NESTED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Return rows o [ROWS] of an expert's weight, features d .. d + WIDTH - 1, [ROWS, WIDTH]. d is a multiple of 64."""
    BLOCKS: tl.constexpr = WIDTH // 64
    row = expert.to(tl.int64) * OUT + o
    half = tl.arange(0, WIDTH // 2)
    inside = (o < OUT)[:, None] & ((d + 2 * half) < D)[None, :]
    data = tl.load(packed + (row * (D // 2))[:, None] + (d // 2 + half)[None, :], mask=inside, other=0).to(tl.int32)
    nibbles = tl.join(data >> 4, data & 15).reshape(ROWS, WIDTH)
    # in registers: looked up in the L1 cache, the whole product took six times as long (H100)
    values = tl.gather(tl.load(code + tl.arange(0, 16)), nibbles.reshape(ROWS * WIDTH), 0)
    number = tl.arange(0, BLOCKS)
    block = (row * (D // 64))[:, None] + (d // 64 + number)[None, :]
    exists = (o < OUT)[:, None] & ((d // 64 + number) < D // 64)[None, :]
    scale = tl.load(absmax + block, mask=exists, other=0)
    if NESTED:
        nested = tl.load(nested_absmax + block // 256, mask=exists, other=0.0)
        scale = tl.load(nested_code + scale.to(tl.int32)) * nested + tl.load(nested_offset)
        scale = tl.where(exists, scale, 0.0)
    scaled = values.reshape(ROWS, BLOCKS, 64) * scale[:, :, None]
    return scaled.reshape(ROWS, WIDTH).to(DTYPE)


@triton.jit
def _linear_kernel(
    x, packed, code, absmax, nested_code, nested_absmax, nested_offset, ends, bias, low, b, out,
    S, E, OUT, D, R, stride_x, stride_low, tiles_o,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr, RANK: tl.constexpr, GROUPS: tl.constexpr,
    NESTED: tl.constexpr, SWAPPED: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one tile of x W^T + bias + low B^T."""
    program = tl.program_id(0)
    expert, first, end = _find(ends, S, E, program // tiles_o, ROWS, GROUPS)
    if expert > E:
        return
    s = first + tl.arange(0, ROWS)
    o = (program % tiles_o) * FEATURES + tl.arange(0, FEATURES)
    target = out + s.to(tl.int64)[:, None] * OUT + o[None, :]
    inside = (s < end)[:, None] & (o < OUT)[None, :]
    total = tl.zeros((ROWS, FEATURES), dtype=tl.float32)
    if expert < E:
        if SWAPPED:
            turned = tl.zeros((FEATURES, ROWS), dtype=tl.float32)
        k = tl.arange(0, DEPTH)
        rows = x + s.to(tl.int64)[:, None] * stride_x
        for d in range(0, D, DEPTH):
            part = tl.load(rows + (d + k)[None, :], mask=(s < end)[:, None] & ((d + k) < D)[None, :], other=0.0)
            weight = _weights(packed, code, absmax, nested_code, nested_absmax, nested_offset, expert, o, d, OUT, D,
                              FEATURES, DEPTH, NESTED, x.dtype.element_ty)  # fmt: skip
            if SWAPPED:
                turned = tl.dot(weight, tl.trans(part), turned, input_precision=PRECISION)
            else:
                total = tl.dot(part, tl.trans(weight), total, input_precision=PRECISION)
        if SWAPPED:
            total = tl.trans(turned)
        if RANK > 0:
            r = tl.arange(0, RANK)
            has_rank = (r < R)[None, :]
            lows = tl.load(low + s.to(tl.int64)[:, None] * stride_low + r[None, :], mask=(s < end)[:, None] & has_rank, other=0.0)
            part_b = b + (expert.to(tl.int64) * OUT + o)[:, None] * R + r[None, :]
            bs = tl.load(part_b, mask=(o < OUT)[:, None] & has_rank, other=0.0)
            total = tl.dot(lows, tl.trans(bs), total, input_precision=PRECISION)
        if HAS_BIAS:
            total += tl.load(bias + expert * OUT + o, mask=o < OUT, other=0.0).to(tl.float32)[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _input_gradient_kernel(
    dy, packed, code, absmax, nested_code, nested_absmax, nested_offset, ends, dlow, a, out,
    S, E, OUT, D, R, stride_dy, stride_low, tiles_d,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr, RANK: tl.constexpr, GROUPS: tl.constexpr,
    NESTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one tile of dy W + dlow A."""
    program = tl.program_id(0)
    expert, first, end = _find(ends, S, E, program // tiles_d, ROWS, GROUPS)
    if expert > E:
        return
    s = first + tl.arange(0, ROWS)
    start = (program % tiles_d) * FEATURES
    d = start + tl.arange(0, FEATURES)
    total = tl.zeros((ROWS, FEATURES), dtype=tl.float32)
    if expert < E:
        k = tl.arange(0, DEPTH)
        rows = dy + s.to(tl.int64)[:, None] * stride_dy
        for o in range(0, OUT, DEPTH):
            part = tl.load(rows + (o + k)[None, :], mask=(s < end)[:, None] & ((o + k) < OUT)[None, :], other=0.0)
            weight = _weights(packed, code, absmax, nested_code, nested_absmax, nested_offset, expert, o + k, start, OUT, D,
                              DEPTH, FEATURES, NESTED, dy.dtype.element_ty)  # fmt: skip
            total = tl.dot(part, weight, total, input_precision=PRECISION)
        if RANK > 0:
            r = tl.arange(0, RANK)
            has_rank = (r < R)[None, :]
            part_low = dlow + s.to(tl.int64)[:, None] * stride_low + r[None, :]
            lows = tl.load(part_low, mask=(s < end)[:, None] & has_rank, other=0.0)
            rank_rows = expert.to(tl.int64) * R + r
            parts = tl.load(a + rank_rows[:, None] * D + d[None, :], mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
            total = tl.dot(lows, parts, total, input_precision=PRECISION)
    target = out + s.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(s < end)[:, None] & (d < D)[None, :])


@triton.jit
def _add_terms_kernel(
    y, low, b, bias, ends, S, E, OUT, R, stride_y, stride_low, stride_e, stride_o, stride_r, tiles_o,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, RANK: tl.constexpr, GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add low B^T + bias to one tile of y; B may be laid out in any way."""
    program = tl.program_id(0)
    expert, first, end = _find(ends, S, E, program // tiles_o, ROWS, GROUPS)
    if expert >= E:
        return
    s = first + tl.arange(0, ROWS)
    o = (program % tiles_o) * FEATURES + tl.arange(0, FEATURES)
    target = y + s.to(tl.int64)[:, None] * stride_y + o[None, :]
    inside = (s < end)[:, None] & (o < OUT)[None, :]
    total = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    if RANK > 0:
        r = tl.arange(0, RANK)
        has_rank = (s < end)[:, None] & (r < R)[None, :]
        lows = tl.load(low + s.to(tl.int64)[:, None] * stride_low + r[None, :], mask=has_rank, other=0.0)
        parts = b + expert.to(tl.int64) * stride_e + o[:, None].to(tl.int64) * stride_o + r[None, :] * stride_r
        bs = tl.load(parts, mask=(o < OUT)[:, None] & (r < R)[None, :], other=0.0)
        total = tl.dot(lows, tl.trans(bs), total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + expert * OUT + o, mask=o < OUT, other=0.0).to(tl.float32)[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _low_rank_kernel(
    x, a, ends, out, S, E, D, R, stride_x, stride_e, stride_r, stride_d,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, RANK: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one tile of x A^T; A may be laid out in any way."""
    expert, first, end = _find(ends, S, E, tl.program_id(0), ROWS, GROUPS)
    if expert > E:
        return
    s, r, k = first + tl.arange(0, ROWS), tl.arange(0, RANK), tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, RANK), dtype=tl.float32)
    if expert < E:
        rows = x + s.to(tl.int64)[:, None] * stride_x
        parts = a + expert.to(tl.int64) * stride_e + r[None, :] * stride_r
        for d in range(0, D, DEPTH):
            part = tl.load(rows + (d + k)[None, :], mask=(s < end)[:, None] & ((d + k) < D)[None, :], other=0.0)
            weight = tl.load(parts + (d + k)[:, None] * stride_d, mask=((d + k) < D)[:, None] & (r < R)[None, :], other=0.0)
            total = tl.dot(part, weight, total, input_precision=PRECISION)
    target = out + s.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(s < end)[:, None] & (r < R)[None, :])


@triton.jit
def _outer_kernel(
    low, x, ends, out, D, R, stride_low, stride_x,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum low^T x over one expert's rows, for one tile of features, in fp32."""
    expert = tl.program_id(0)
    end = tl.load(ends + expert)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    d, r, k = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES), tl.arange(0, RANK), tl.arange(0, ROWS)
    total = tl.zeros((RANK, FEATURES), dtype=tl.float32)
    for first in range(start, end, ROWS):
        s = (first + k).to(tl.int64)
        lows = tl.load(low + s[None, :] * stride_low + r[:, None], mask=(s < end)[None, :] & (r < R)[:, None], other=0.0)
        part = tl.load(x + s[:, None] * stride_x + d[None, :], mask=(s < end)[:, None] & (d < D)[None, :], other=0.0)
        total = tl.dot(lows, part, total, input_precision=PRECISION)
    target = out + (expert.to(tl.int64) * R + r)[:, None] * D + d[None, :]
    tl.store(target, total, mask=(r < R)[:, None] & (d < D)[None, :])


@triton.jit
def _combine_kernel(
    rows, inverse, weights, out, D, stride, CHOICES: tl.constexpr, WIDTH: tl.constexpr, HAS_WEIGHTS: tl.constexpr
):
    """Sum the rows of one token, in fp32 and in the order of its choices."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for k in range(CHOICES):
        row = tl.load(inverse + token * CHOICES + k)
        part = tl.load(rows + row * stride + d, mask=d < D, other=0.0).to(tl.float32)
        total += part * tl.load(weights + token * CHOICES + k).to(tl.float32) if HAS_WEIGHTS else part
    tl.store(out + token * D + d, total.to(out.dtype.element_ty), mask=d < D)


def linear(
    x_SD: Tensor, state: Nf4State, ends_E: Tensor, bias_EO: Tensor | None = None,
    low_SR: Tensor | None = None, b_EOR: Tensor | None = None, tile: ExpertTile | None = None,
) -> Tensor:  # fmt: skip
    """Return x W_e^T + bias_e + low B_e^T [S, O]."""
    (experts, height, width), rows = state.shape, x_SD.shape[0]
    tile = tile or FORWARD
    y_SO, tiles = x_SD.new_empty(rows, height), triton.cdiv(height, tile.features)
    rank = 0 if low_SR is None else low_SR.shape[1]
    _linear_kernel[(tiles * _row_tiles(rows, experts, tile.rows),)](
        x_SD, *_parts(state), ends_E, bias_EO, low_SR, None if b_EOR is None else b_EOR.contiguous(), y_SO,
        rows, experts, height, width, rank, x_SD.stride(0), rank and low_SR.stride(0), tiles,
        ROWS=tile.rows, FEATURES=tile.features, DEPTH=tile.depth, HAS_BIAS=bias_EO is not None,
        NESTED=state.nested_code is not None, SWAPPED=tile.swapped, **_common(rank, experts, x_SD),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y_SO


def input_gradient(
    dy_SO: Tensor, state: Nf4State, ends_E: Tensor, dlow_SR: Tensor | None = None, a_ERD: Tensor | None = None,
    tile: ExpertTile | None = None,
) -> Tensor:  # fmt: skip
    """Return dy W_e + dlow A_e [S, D]."""
    (experts, height, width), rows = state.shape, dy_SO.shape[0]
    tile = tile or BACKWARD
    dx_SD, tiles = dy_SO.new_empty(rows, width), triton.cdiv(width, tile.features)
    rank = 0 if dlow_SR is None else dlow_SR.shape[1]
    _input_gradient_kernel[(tiles * _row_tiles(rows, experts, tile.rows),)](
        dy_SO, *_parts(state), ends_E, dlow_SR, None if a_ERD is None else a_ERD.contiguous(), dx_SD,
        rows, experts, height, width, rank, dy_SO.stride(0), rank and dlow_SR.stride(0), tiles,
        ROWS=tile.rows, FEATURES=tile.features, DEPTH=tile.depth, NESTED=state.nested_code is not None,
        **_common(rank, experts, dy_SO), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dx_SD


def add_terms_(
    y_SO: Tensor, ends_E: Tensor, bias_EO: Tensor | None, low_SR: Tensor | None, b_EOR: Tensor | None,
    tile: ExpertTile | None = None,
) -> Tensor:  # fmt: skip
    """Add bias_e + low B_e^T to y [S, O] in place and return it."""
    (rows, height), experts, tile = y_SO.shape, ends_E.numel(), tile or TERMS
    tiles, rank = triton.cdiv(height, tile.features), 0 if low_SR is None else low_SR.shape[1]
    _add_terms_kernel[(tiles * _row_tiles(rows, experts, tile.rows),)](
        y_SO, low_SR, b_EOR, bias_EO, ends_E, rows, experts, height, rank, y_SO.stride(0), rank and low_SR.stride(0),
        *((0, 0, 0) if b_EOR is None else b_EOR.stride()), tiles,
        ROWS=tile.rows, FEATURES=tile.features, HAS_BIAS=bias_EO is not None, **_common(rank, experts, y_SO),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y_SO


def low_rank(x_SD: Tensor, a_ERD: Tensor, ends_E: Tensor) -> Tensor:
    """Return x A_e^T [S, R]."""
    (experts, rank, width), rows = a_ERD.shape, x_SD.shape[0]
    low_SR = x_SD.new_empty(rows, rank)
    _low_rank_kernel[(_row_tiles(rows, experts, SMALL_ROWS),)](
        x_SD, a_ERD, ends_E, low_SR, rows, experts, width, rank, x_SD.stride(0), *a_ERD.stride(),
        ROWS=SMALL_ROWS, DEPTH=SMALL_DEPTH, **_common(rank, experts, x_SD), num_warps=4, num_stages=3,
    )  # fmt: skip
    return low_SR


def outer(left_SM: Tensor, right_SN: Tensor, ends_E: Tensor) -> Tensor:
    """Return the sum over each expert's rows of left^T right, [E, M, N] in fp32; one of M and N is a rank."""
    if left_SM.shape[1] > right_SN.shape[1]:
        return outer(right_SN, left_SM, ends_E).transpose(1, 2)
    rank, width, experts = left_SM.shape[1], right_SN.shape[1], ends_E.numel()
    out_ERD = torch.empty(experts, rank, width, dtype=torch.float32, device=left_SM.device)
    common = _common(rank, experts, left_SM)
    del common["GROUPS"]
    _outer_kernel[(experts, triton.cdiv(width, OUTER_FEATURES))](
        left_SM, right_SN, ends_E, out_ERD, width, rank, left_SM.stride(0), right_SN.stride(0),
        ROWS=OUTER_ROWS, FEATURES=OUTER_FEATURES, **common, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out_ERD


def combine(rows_SD: Tensor, inverse_S: Tensor, weights_TK: Tensor | None, num_choices: int) -> Tensor:
    """Return the sum over each token's K rows, times their weights if there are some, [T, D]."""
    tokens, width = rows_SD.shape[0] // num_choices, rows_SD.shape[1]
    out_TD = rows_SD.new_empty(tokens, width)
    _combine_kernel[(tokens, triton.cdiv(width, COMBINED))](
        rows_SD, inverse_S, None if weights_TK is None else weights_TK.contiguous(), out_TD, width, rows_SD.stride(0),
        CHOICES=num_choices, WIDTH=COMBINED, HAS_WEIGHTS=weights_TK is not None, num_warps=4,
    )  # fmt: skip
    return out_TD


def takes(state: Nf4State) -> bool:
    """Return True if the kernels read weights of this form: whole blocks in each row."""
    return state.shape[2] % BLOCK == 0


def _parts(state: Nf4State) -> tuple[Any, ...]:
    return state.packed, state.code, state.absmax_M, state.nested_code, state.nested_absmax_S, state.nested_offset


def _row_tiles(rows: int, experts: int, height: int) -> int:
    """Return the most row tiles that any routing makes."""
    return triton.cdiv(rows, height) + min(experts + 1, rows)


def _common(rank: int, experts: int, x: Tensor) -> dict[str, Any]:
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    padded = max(16, triton.next_power_of_2(rank)) if rank else 0
    return {"RANK": padded, "GROUPS": triton.next_power_of_2(experts + 1), "PRECISION": precision}
