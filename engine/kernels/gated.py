"""Compute a gated linear unit in Triton: h = act(gate) * up. Its backward pass works in place.

The backward pass leaves h in dh's memory, so the forward pass need not save h for the gradient of
the next matmul's adapter.

Each operand may have a low-rank term, which the kernel adds in fp32 while it reads the operand. An
adapter then costs one small matrix product per tile and no pass over a [T, F] tensor. Kernels with
terms work on tiles; those without work on pieces of rows, which is faster still.

Shape letters: T tokens, F MLP hidden, R rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.reference import LowRank

BLOCK_F = 2048  # divides 8,192 and 14,336; two 16-byte loads of bf16 per thread and tensor
NUM_WARPS = 4
# Tiles of the kernels with terms. 64 rows are Hopper's smallest matrix instruction. Microseconds
# forward / backward on an H100 at 4,096 x 14,336, rank 16: 64 x 32 takes 170 / 353, 64 x 64 takes
# 187 / 354, 128 x 32 takes 201 / 417. 64 x 128 spills registers and takes 228 / 454. Without terms
# it is 122 / 242. 8 warps are mostly slower backward. fp32 operands have no exact matrix
# instruction and need more registers without one, hence the smaller tile.
TILE, TILE_R = (64, 32), 64
TILE_FP32, TILE_R_FP32 = (32, 32), 16
GROUP = 8


@triton.jit
def activate(g, GELU: tl.constexpr):
    """Return act(g) and act'(g).

    Both activations are g * sigmoid(s): silu has s = g, gelu_tanh has s = 2 sqrt(2 / pi) (g +
    0.044715 g^3).
    """
    if GELU:
        s = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        ds = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
        p = 1.0 / (1.0 + tl.exp(-s))
        return g * p, p + g * p * (1.0 - p) * ds
    else:
        p = 1.0 / (1.0 + tl.exp(-g))
        return g * p, p + g * p * (1.0 - p)


@triton.jit
def _place(F, BLOCK_F: tl.constexpr):
    """Return this program's row, its columns and the mask of columns that exist.

    The grid has one axis, because the other axes end at 65,535.
    """
    blocks_per_row = tl.cdiv(F, BLOCK_F)
    row = tl.program_id(0) // blocks_per_row
    columns = (tl.program_id(0) % blocks_per_row) * BLOCK_F + tl.arange(0, BLOCK_F)
    return row.to(tl.int64), columns, columns < F


@triton.jit
def _forward_kernel(gate, up, h, gate_stride, up_stride, F, GELU: tl.constexpr, BLOCK_F: tl.constexpr):
    row, columns, inside = _place(F, BLOCK_F)
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    act, _ = activate(g, GELU)
    tl.store(h + row * F + columns, (act * u).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(dh, gate, up, dh_stride, gate_stride, up_stride, F, GELU: tl.constexpr, BLOCK_F: tl.constexpr):
    """Write gate <- dh * up * act'(gate), up <- dh * act(gate), dh <- act(gate) * up."""
    row, columns, inside = _place(F, BLOCK_F)
    dh += row * dh_stride
    gate += row * gate_stride
    up += row * up_stride
    d = tl.load(dh + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + columns, mask=inside, other=0.0).to(tl.float32)
    act, slope = activate(g, GELU)
    tl.store(dh + columns, (act * u).to(dh.dtype.element_ty), mask=inside)
    tl.store(gate + columns, (d * u * slope).to(gate.dtype.element_ty), mask=inside)
    tl.store(up + columns, (d * act).to(up.dtype.element_ty), mask=inside)


@triton.jit
def _tile(T, F, GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    """Return the tile's first row and column, its row and column offsets, and its mask.

    Neighbouring programs take GROUP row tiles of one column block, then those of the next, so they
    share a slice of b. All of b (7 MB at rank 256) may not fit in the L2 cache. The card then reads
    it once per group instead of once per row tile.
    """
    down, across = tl.cdiv(T, BLOCK_T), tl.cdiv(F, BLOCK_F)
    first = tl.program_id(0) // (GROUP * across) * GROUP
    within = tl.program_id(0) % (GROUP * across)
    height = min(GROUP, down - first)
    row = (first + within % height).to(tl.int64) * BLOCK_T
    column = within // height * BLOCK_F
    t, f = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_F)[None, :]
    return row, column, t, f, (t < T - row) & (f < F - column)


@triton.jit
def _plus(
    x, low, b, low_t, low_r, b_f, b_r, row, column, T, F,
    RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Return x + low @ b^T on one tile in fp32; RANK 0 means no term.

    RANK is a compile-time constant, at the price of one compilation per rank. A rank of one block
    then needs no loop, and that loop cost the backward pass 70 to 90 more registers.
    """
    x = x.to(tl.float32)
    if RANK > 0:
        t, f = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_F)[None, :]
        low += row * low_t + t * low_t
        b += column.to(tl.int64) * b_f + f * b_f
        total = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
        for start in range(0, RANK, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            low_block = tl.load(low + r[None, :] * low_r, mask=(t < T - row) & (r[None, :] < RANK), other=0.0)
            b_block = tl.load(b + r[:, None] * b_r, mask=(f < F - column) & (r[:, None] < RANK), other=0.0)
            total = tl.dot(low_block, b_block, total, input_precision="ieee")
        x += total
    return x


@triton.jit(do_not_specialize=["T"])  # T changes from batch to batch; its divisors gain nothing
def _tiled_forward_kernel(
    gate, up, h, gate_stride, up_stride, T, F,
    gate_low, gate_b, gate_low_t, gate_low_r, gate_b_f, gate_b_r,
    up_low, up_b, up_low_t, up_low_r, up_b_f, up_b_r,
    GATE_RANK: tl.constexpr, UP_RANK: tl.constexpr, GELU: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row, column, t, f, inside = _tile(T, F, GROUP, BLOCK_T, BLOCK_F)
    gate += row * gate_stride + column + t * gate_stride + f
    up += row * up_stride + column + t * up_stride + f
    h += row * F + column + t * F + f
    # Start the loads of all operands before the first product waits for its own.
    g = tl.load(gate, mask=inside, other=0.0)
    u = tl.load(up, mask=inside, other=0.0)
    g = _plus(
        g, gate_low, gate_b, gate_low_t, gate_low_r, gate_b_f, gate_b_r, row, column, T, F,
        GATE_RANK, BLOCK_T, BLOCK_F, BLOCK_R,
    )  # fmt: skip
    u = _plus(
        u, up_low, up_b, up_low_t, up_low_r, up_b_f, up_b_r, row, column, T, F,
        UP_RANK, BLOCK_T, BLOCK_F, BLOCK_R,
    )  # fmt: skip
    act, _ = activate(g, GELU)
    tl.store(h, (act * u).to(h.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _tiled_backward_kernel(
    dh, gate, up, dh_stride, gate_stride, up_stride, T, F,
    dh_low, dh_b, dh_low_t, dh_low_r, dh_b_f, dh_b_r,
    gate_low, gate_b, gate_low_t, gate_low_r, gate_b_f, gate_b_r,
    up_low, up_b, up_low_t, up_low_r, up_b_f, up_b_r,
    DH_RANK: tl.constexpr, GATE_RANK: tl.constexpr, UP_RANK: tl.constexpr, GELU: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row, column, t, f, inside = _tile(T, F, GROUP, BLOCK_T, BLOCK_F)
    dh += row * dh_stride + column + t * dh_stride + f
    gate += row * gate_stride + column + t * gate_stride + f
    up += row * up_stride + column + t * up_stride + f
    d = tl.load(dh, mask=inside, other=0.0)
    g = tl.load(gate, mask=inside, other=0.0)
    u = tl.load(up, mask=inside, other=0.0)
    d = _plus(
        d, dh_low, dh_b, dh_low_t, dh_low_r, dh_b_f, dh_b_r, row, column, T, F,
        DH_RANK, BLOCK_T, BLOCK_F, BLOCK_R,
    )  # fmt: skip
    g = _plus(
        g, gate_low, gate_b, gate_low_t, gate_low_r, gate_b_f, gate_b_r, row, column, T, F,
        GATE_RANK, BLOCK_T, BLOCK_F, BLOCK_R,
    )  # fmt: skip
    u = _plus(
        u, up_low, up_b, up_low_t, up_low_r, up_b_f, up_b_r, row, column, T, F,
        UP_RANK, BLOCK_T, BLOCK_F, BLOCK_R,
    )  # fmt: skip
    act, slope = activate(g, GELU)
    tl.store(dh, (act * u).to(dh.dtype.element_ty), mask=inside)
    tl.store(gate, (d * u * slope).to(gate.dtype.element_ty), mask=inside)
    tl.store(up, (d * act).to(up.dtype.element_ty), mask=inside)


def glu(
    gate_TF: Tensor, up_TF: Tensor, activation: str, gate_add: LowRank | None = None, up_add: LowRank | None = None
) -> Tensor:
    num_tokens, width = gate_TF.shape
    h_TF = torch.empty((num_tokens, width), dtype=gate_TF.dtype, device=gate_TF.device)
    if not h_TF.numel():
        return h_TF
    tensors, gelu = (gate_TF, up_TF, h_TF, gate_TF.stride(0), up_TF.stride(0)), activation == "gelu_tanh"
    if not (gate_add or up_add):
        block, warps = _launch(width)
        grid = (num_tokens * triton.cdiv(width, block),)
        _forward_kernel[grid](*tensors, width, GELU=gelu, BLOCK_F=block, num_warps=warps)
        return h_TF
    grid, tile = _launch_tiled(gate_TF, (gate_add, up_add))
    _tiled_forward_kernel[grid](
        *tensors, num_tokens, width, *_term(gate_add, gate_TF), *_term(up_add, gate_TF),
        GATE_RANK=_rank(gate_add), UP_RANK=_rank(up_add), GELU=gelu, **tile,
    )  # fmt: skip
    return h_TF


def glu_backward_(
    dh_TF: Tensor, gate_TF: Tensor, up_TF: Tensor, activation: str,
    gate_add: LowRank | None = None, up_add: LowRank | None = None, dh_add: LowRank | None = None,
) -> None:  # fmt: skip
    num_tokens, width = gate_TF.shape
    if not gate_TF.numel():
        return
    tensors = (dh_TF, gate_TF, up_TF, dh_TF.stride(0), gate_TF.stride(0), up_TF.stride(0))
    terms, gelu = (dh_add, gate_add, up_add), activation == "gelu_tanh"
    if not any(terms):
        block, warps = _launch(width)
        grid = (num_tokens * triton.cdiv(width, block),)
        _backward_kernel[grid](*tensors, width, GELU=gelu, BLOCK_F=block, num_warps=warps)
        return
    grid, tile = _launch_tiled(gate_TF, terms)
    _tiled_backward_kernel[grid](
        *tensors, num_tokens, width, *(argument for term in terms for argument in _term(term, gate_TF)),
        DH_RANK=_rank(dh_add), GATE_RANK=_rank(gate_add), UP_RANK=_rank(up_add), GELU=gelu, **tile,
    )  # fmt: skip


def _launch(width: int) -> tuple[int, int]:
    """Return block and warps: 16 elements per thread, and no block wider than the row needs."""
    block = min(BLOCK_F, triton.next_power_of_2(width))
    return block, max(1, NUM_WARPS * block // BLOCK_F)


def _launch_tiled(gate_TF: Tensor, terms: tuple[LowRank | None, ...]) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid and the launch options.

    One stage: several programs per multiprocessor hide latency, and more buffers would leave room
    for fewer of them.
    """
    (block_t, block_f), most = (TILE_FP32, TILE_R_FP32) if gate_TF.dtype == torch.float32 else (TILE, TILE_R)
    # 16 is the smallest inner size that tl.dot accepts.
    block_r = min(most, max(16, *(triton.next_power_of_2(_rank(term)) for term in terms)))
    grid = (triton.cdiv(gate_TF.shape[0], block_t) * triton.cdiv(gate_TF.shape[1], block_f),)
    tile = {"GROUP": GROUP, "BLOCK_T": block_t, "BLOCK_F": block_f, "BLOCK_R": block_r, "num_warps": 4, "num_stages": 1}
    return grid, tile


def _rank(term: LowRank | None) -> int:
    return 0 if term is None else term.low_TR.shape[1]


def _term(term: LowRank | None, unread: Tensor) -> tuple[Tensor | int, ...]:
    """Return a term as kernel arguments; without one, `unread` is a pointer no kernel reads."""
    if term is None:
        return unread, unread, 0, 0, 0, 0
    return term.low_TR, term.b_FR, *term.low_TR.stride(), *term.b_FR.stride()
