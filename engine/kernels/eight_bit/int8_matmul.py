"""Multiply int8 codes in Triton, with scales, the adapter's low-rank term and the bias in the epilogue.

Both operands have K contiguous, as the matrix instructions for 8-bit integers want them. There are
two ways to load them, and `int8_tiles` chooses one by card and shape:

* pointers: one program per tile, asynchronous copies. Every card since Ampere has them.
* descriptors: the copy engine of Hopper and later loads whole tiles. Programs stay on their
  multiprocessor and take tile after tile.

Sums of codes are exact in int32, in any order. So both ways and all tiles give the same sums, and
tiles differ only in the rounding of the low-rank term.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.eight_bit.card_facts import capability, multiprocessors
from engine.kernels.eight_bit.int8_reference import Int8Rows
from engine.kernels.eight_bit.int8_tiles import Tile, choose_tile
from engine.kernels.reference import LowRank

LONGEST_TERM_BLOCK = 64  # ranks of a term in one product
ALIGNMENT = 16  # bytes, of the rows that a descriptor loads


@triton.jit
def _place(tile, T, N, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, HEIGHT: tl.constexpr):
    """Return a tile's first row and column. Neighbours go down HEIGHT tiles before they go across."""
    down, across = tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N)
    first = tile // (HEIGHT * across) * HEIGHT
    within = tile % (HEIGHT * across)
    height = min(HEIGHT, down - first)
    return (first + within % height) * BLOCK_T, within // height * BLOCK_N


@triton.jit
def _write(
    sums, row, column, c, scale_a, scale_b, low, low_b, bias, T, N, second, third, low_t, low_r, low_b_n, low_b_r,
    RANK: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write sums * scale_a * scale_b + low @ low_b^T + bias for one tile, rounded once.

    Columns from `second` and from `third` on take the next RANK columns of low.
    """
    t, n = row + tl.arange(0, BLOCK_T), column + tl.arange(0, BLOCK_N)
    t_exists, n_exists = t < T, n < N
    total = sums.to(tl.float32) * tl.load(scale_a + t, mask=t_exists, other=0.0)[:, None]
    total = total * tl.load(scale_b + n, mask=n_exists, other=0.0)[None, :]
    t = t.to(tl.int64)
    if RANK > 0:
        low += ((column >= second).to(tl.int32) + (column >= third).to(tl.int32)) * RANK * low_r
        for start in tl.static_range(0, RANK, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            low_mask, low_b_mask = t_exists[:, None] & (r < RANK)[None, :], n_exists[:, None] & (r < RANK)[None, :]
            low_block = tl.load(low + t[:, None] * low_t + r[None, :] * low_r, mask=low_mask, other=0.0)
            low_b_block = tl.load(low_b + n.to(tl.int64)[:, None] * low_b_n + r[None, :] * low_b_r, mask=low_b_mask, other=0.0)
            total = tl.dot(low_block, tl.trans(low_b_block), total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n_exists, other=0.0).to(tl.float32)[None, :]
    tl.store(c + t[:, None] * N + n[None, :], total.to(c.dtype.element_ty), mask=t_exists[:, None] & n_exists[None, :])


@triton.jit
def _write_halves(
    sums, row, column, c, scale_a, scale_b, low, low_b, bias, T, N, second, third, low_t, low_r, low_b_n, low_b_r,
    RANK: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """Write one tile whole, or its left and right half in turn, which needs half the shared memory."""
    if HALVES:
        WIDTH: tl.constexpr = BLOCK_N // 2
        left, right = sums.reshape(BLOCK_T, 2, WIDTH).permute(0, 2, 1).split()
        middle = column + WIDTH
        _write(
            left, row, column, c, scale_a, scale_b, low, low_b, bias, T, N, second, third, low_t, low_r, low_b_n, low_b_r,
            RANK, HAS_BIAS, BLOCK_T, WIDTH, BLOCK_R,
        )  # fmt: skip
        _write(
            right, row, middle, c, scale_a, scale_b, low, low_b, bias, T, N, second, third, low_t, low_r, low_b_n, low_b_r,
            RANK, HAS_BIAS, BLOCK_T, WIDTH, BLOCK_R,
        )  # fmt: skip
    else:
        _write(
            sums, row, column, c, scale_a, scale_b, low, low_b, bias, T, N, second, third, low_t, low_r, low_b_n, low_b_r,
            RANK, HAS_BIAS, BLOCK_T, BLOCK_N, BLOCK_R,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"])  # T changes from batch to batch; its divisors gain nothing
def _pointer_kernel(
    a, b, c, scale_a, scale_b, low, low_b, bias, T, N, K, second, third, a_stride, b_stride, low_t, low_r, low_b_n, low_b_r,
    RANK: tl.constexpr, HAS_BIAS: tl.constexpr, WHOLE_K: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    row, column = _place(tl.program_id(0), T, N, BLOCK_T, BLOCK_N, HEIGHT)
    # Rows past the end read the last one again: nothing of theirs is written.
    t = tl.minimum(row + tl.arange(0, BLOCK_T), T - 1).to(tl.int64)
    n = tl.minimum(column + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    a += t[:, None] * a_stride + k[None, :]
    b += n[:, None] * b_stride + k[None, :]
    sums = tl.zeros((BLOCK_T, BLOCK_N), tl.int32)
    for start in range(0, K, BLOCK_K):
        if WHOLE_K:
            a_block, b_block = tl.load(a), tl.load(b)
        else:
            a_block = tl.load(a, mask=(k < K - start)[None, :], other=0)
            b_block = tl.load(b, mask=(k < K - start)[None, :], other=0)
        sums = tl.dot(a_block, tl.trans(b_block), sums, out_dtype=tl.int32)
        a += BLOCK_K
        b += BLOCK_K
    _write_halves(
        sums, row, column, c, scale_a, scale_b, low, low_b, bias, T, N, second, third, low_t, low_r, low_b_n, low_b_r,
        RANK, HAS_BIAS, BLOCK_T, BLOCK_N, BLOCK_R, HALVES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _descriptor_kernel(
    a, b, c, scale_a, scale_b, low, low_b, bias, T, N, K, second, third, low_t, low_r, low_b_n, low_b_r,
    RANK: tl.constexpr, HAS_BIAS: tl.constexpr, HALVES: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    """Compute the tiles whose number, modulo the number of programs, is this program's.

    a and b are descriptors, which give zeros outside the operands. FLAT makes one loop of both, so
    that a tile's first loads overlap the previous tile's end.
    """
    tiles = tl.cdiv(T, BLOCK_T) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLAT):
        row, column = _place(tile, T, N, BLOCK_T, BLOCK_N, HEIGHT)
        sums = tl.zeros((BLOCK_T, BLOCK_N), tl.int32)
        for start in range(0, K, BLOCK_K):
            a_block, b_block = a.load([row, start]), b.load([column, start])
            sums = tl.dot(a_block, tl.trans(b_block), sums, out_dtype=tl.int32)
        _write_halves(
            sums, row, column, c, scale_a, scale_b, low, low_b, bias, T, N, second, third, low_t, low_r, low_b_n, low_b_r,
            RANK, HAS_BIAS, BLOCK_T, BLOCK_N, BLOCK_R, HALVES,
        )  # fmt: skip


def matmul(
    a: Int8Rows, b: Int8Rows, dtype: torch.dtype, term: LowRank | None, bias_N: Tensor | None, firsts: tuple[int, ...] = ()
) -> Tensor:
    (num_tokens, reduced), num_columns = a.codes_NK.shape, b.codes_NK.shape[0]
    card = capability(a.codes_NK), multiprocessors(a.codes_NK)
    can_describe = _can_describe(a.codes_NK) and _can_describe(b.codes_NK)
    tile = choose_tile(*card, num_tokens, num_columns, reduced, can_describe, term is not None)
    return launch_matmul(a, b, dtype, term, bias_N, tile, firsts)


def launch_matmul(
    a: Int8Rows, b: Int8Rows, dtype: torch.dtype, term: LowRank | None, bias_N: Tensor | None, tile: Tile,
    firsts: tuple[int, ...] = (),
) -> Tensor:  # fmt: skip
    """Multiply with the caller's choice of tile (the benchmark's)."""
    codes_a, codes_b = a.codes_NK, b.codes_NK
    (num_tokens, reduced), num_columns = codes_a.shape, codes_b.shape[0]
    c_TN = torch.empty((num_tokens, num_columns), dtype=dtype, device=codes_a.device)
    if not num_tokens or not num_columns:
        return c_TN
    rank = 0 if term is None else term.b_FR.shape[1]
    second, third, *_ = (*firsts, num_columns, num_columns)
    grid, options = _launch(tile, multiprocessors(codes_a), num_tokens, num_columns, reduced, rank, bias_N is not None)
    low, low_b = (c_TN, c_TN) if term is None else (term.low_TR, term.b_FR)
    steps = (0, 0, 0, 0) if term is None else (*low.stride(), *low_b.stride())
    given = (c_TN, a.scale_N, b.scale_N, low, low_b, c_TN if bias_N is None else bias_N, num_tokens, num_columns, reduced)
    if tile.described:
        described = _descriptor(codes_a, tile.t, tile.k), _descriptor(codes_b, tile.n, tile.k)
        _descriptor_kernel[grid](*described, *given, second, third, *steps, **options)
    else:
        strides = codes_a.stride(0), codes_b.stride(0)
        _pointer_kernel[grid](codes_a, codes_b, *given, second, third, *strides, *steps, **options)
    return c_TN


@functools.lru_cache(4096)
def _launch(
    tile: Tile, processors: int, num_tokens: int, num_columns: int, reduced: int, rank: int, has_bias: bool
) -> tuple[tuple[int], dict[str, object]]:
    """Return the grid and the launch options. Cached, because a step asks for the same few hundreds of times."""
    options = {
        "RANK": rank, "HAS_BIAS": has_bias, "HALVES": tile.halves, "BLOCK_T": tile.t, "BLOCK_N": tile.n, "BLOCK_K": tile.k,
        "BLOCK_R": min(LONGEST_TERM_BLOCK, max(16, triton.next_power_of_2(rank))), "HEIGHT": tile.height,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    tiles = triton.cdiv(num_tokens, tile.t) * triton.cdiv(num_columns, tile.n)
    if tile.described:
        return (min(tiles, tile.per_processor * processors),), options | {"FLAT": tile.flat}
    return (tiles,), options | {"WHOLE_K": reduced % tile.k == 0}


def _descriptor(codes_NK: Tensor, rows: int, k: int) -> object:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(codes_NK, list(codes_NK.shape), list(codes_NK.stride()), [rows, k])


def _can_describe(codes_NK: Tensor) -> bool:
    return codes_NK.data_ptr() % ALIGNMENT == 0 and codes_NK.stride(0) % ALIGNMENT == 0
