"""Compute attention's gradients with stored scores: each score is made once, not three times.

The kernels of document_attention.py make the scores again for dq, for dk and for dv. With wide
heads that is dear: 7 to 8 products instead of 5, and registers for small tiles only. Here the
kernel for dq also stores the probabilities p and the gradients ds of the scores, in 16 bits as
its own products read them. Then dv = p^T dout and dk = ds^T q are plain matrix products. The
results are the same numbers up to the order of sums, and repeat bit for bit.

p and ds are two bands a head: block i of B queries holds the blocks of keys up to its own, as many as
the longest sample or the window reaches. Heads are taken in parts that fit into a fixed size
(`heads_with_stored_scores`).

Shape letters: T tokens, H query heads, G key/value heads, K head dim, P K padded to a power of two.
M and N are the tile's queries and keys, B the queries of a block, WIDE the most blocks of keys that a
block of queries sees.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.attention.attention_tiles import Tile
from engine.kernels.attention.tile_parts import LOG2_E, capped_logits, key_blocks, load_rows, query_blocks, store_rows
from engine.shape import compute_limits

MOST_FEATURES = 256
"""Features of one sum of the products: 128 x 256 in fp32 are half of a multiprocessor's registers."""


@triton.jit
def _cells_before(i, WIDE, B: tl.constexpr):
    """Return the cells of the blocks before block i: block j holds B queries x min(j + 1, WIDE) B keys."""
    narrow = tl.minimum(i, WIDE)
    return (narrow * (narrow + 1) // 2 + (i - narrow) * WIDE) * (B * B)


@triton.jit
def _cells(t, start, WIDE, B: tl.constexpr):
    """Return where key 0 of query `start` + `t` would be stored; all queries are of one block."""
    i = start // B
    row = (start - i * B + t) * (tl.minimum(i + 1, WIDE) * B)
    return _cells_before(i, WIDE, B) + row - tl.maximum(i + 1 - WIDE, 0) * B


@triton.jit
def _scored_blocks(
    dq, q, dout, k, v, p_to, ds_to, k_stride, v_stride, lse_M, delta_M, t, first_M, begin, before, whole, count, T, scale,
    softcap, MASKED: tl.constexpr, CAP: tl.constexpr, WANT_Q: tl.constexpr, N: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Store p and ds of `count` key blocks, and add to dq if WANT_Q."""
    for i in range(0, count):
        if MASKED:
            start = begin + tl.where(i < before, i, i + whole) * N
        else:
            start = begin + (i + before) * N
        start = tl.multiple_of(start, N)
        n = start + tl.arange(0, N)
        k_NP = load_rows(k, start, k_stride, T, MASKED, N, K, P)
        z, slope = capped_logits(tl.dot(q, tl.trans(k_NP), input_precision="ieee"), scale, softcap, CAP)
        p = tl.exp2(z - lse_M[:, None])
        if MASKED:
            p = tl.where((n[None, :] >= first_M[:, None]) & (n[None, :] <= t[:, None]), p, 0.0)
        tl.store(p_to + n[None, :], p.to(p_to.dtype.element_ty))
        dp = tl.dot(dout, tl.trans(load_rows(v, start, v_stride, T, MASKED, N, K, P)), input_precision="ieee")
        ds = (p * (dp - delta_M[:, None]) * slope).to(k_NP.dtype)
        tl.store(ds_to + n[None, :], ds)
        if WANT_Q:
            dq = tl.dot(ds, k_NP, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["T", "WIDE", "first_head", "HEADS"])
def _scores_kernel(
    dout, q, k, v, out, lse, spans, dq, p, ds, do_t, do_h, q_t, q_h, k_t, k_h, v_t, v_h, T, WIDE, first_head, HEADS,
    scale, softcap,
    H: tl.constexpr, GROUP: tl.constexpr, CAP: tl.constexpr, WANT_Q: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, B: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Store p and ds of one query block of one head; write dq if WANT_Q."""
    part = tl.program_id(0) % HEADS
    head = first_head + part
    start = (tl.cdiv(T, M) - 1 - tl.program_id(0) // HEADS) * M
    row = tl.arange(0, M)
    t = start + row
    first_M = tl.load(spans + t, mask=t < T, other=0)
    k += head // GROUP * k_h
    v += head // GROUP * v_h
    do_MP = load_rows(dout + head * do_h, start, do_t, T, True, M, K, P)
    out_MP = load_rows(out + head * K, start, H * K, T, True, M, K, P)
    delta_M = tl.sum(do_MP.to(tl.float32) * out_MP.to(tl.float32), 1)
    at_M = head.to(tl.int64) * T + t
    lse_M = tl.load(lse + at_M, mask=t < T, other=0.0) * LOG2_E
    q_MP = load_rows(q + head * q_h, start, q_t, T, True, M, K, P)
    cell_M1 = part.to(tl.int64) * _cells_before(tl.cdiv(T, B), WIDE, B) + _cells(row, start, WIDE, B)[:, None]
    acc = tl.zeros((M, P), tl.float32) if WANT_Q else 0.0
    begin, before, whole, behind = key_blocks(spans, start, T, True, M, N)
    acc = _scored_blocks(
        acc, q_MP, do_MP, k, v, p + cell_M1, ds + cell_M1, k_t, v_t, lse_M, delta_M, t, first_M, begin, before, whole, whole,
        T, scale, softcap, False, CAP, WANT_Q, N, K, P,
    )  # fmt: skip
    acc = _scored_blocks(
        acc, q_MP, do_MP, k, v, p + cell_M1, ds + cell_M1, k_t, v_t, lse_M, delta_M, t, first_M, begin, before, whole,
        before + behind, T, scale, softcap, True, CAP, WANT_Q, N, K, P,
    )  # fmt: skip
    if WANT_Q:
        store_rows(dq + head * K, acc * scale, start, H * K, T, M, K, P)


@triton.jit
def _product_blocks(
    acc, cells, x, x_stride, n, last_N, start_N, before, whole, count, T, WIDE,
    MASKED: tl.constexpr, M: tl.constexpr, B: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add cells^T @ x of `count` query blocks; cells outside the mask may never have been written."""
    for i in range(0, count):
        if MASKED:
            start = start_N + tl.where(i < before, i, i + whole) * M
        else:
            start = start_N + (i + before) * M
        start = tl.multiple_of(start, M)
        row = tl.arange(0, M)
        cell_MN = tl.load(cells + _cells(row, start, WIDE, B)[:, None] + n[None, :])
        if MASKED:
            t = start + row
            cell_MN = tl.where((t[:, None] >= n[None, :]) & (t[:, None] <= last_N[None, :]), cell_MN, 0.0)
        x_MF = load_rows(x, start, x_stride, T, MASKED, M, WIDTH, F)
        acc = tl.dot(tl.trans(cell_MN), x_MF, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["T", "WIDE", "first_group", "GROUPS"])
def _products_kernel(
    p, ds, q, dout, spans, dk, dv, q_t, q_h, do_t, do_h, T, WIDE, first_group, GROUPS, scale,
    G: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, B: tl.constexpr,
    F: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Write F features of dk or dv of one key block of one key/value head; early blocks come first."""
    slices: tl.constexpr = (K + F - 1) // F
    wants_k = tl.program_id(0) % 2 == 0
    feature = tl.program_id(0) // 2 % slices * F
    part = tl.program_id(0) // (2 * slices) % GROUPS
    start = tl.program_id(0) // (2 * slices) // GROUPS * N
    own = first_group + part
    n = start + tl.arange(0, N)
    last_N = tl.load(spans + T + n, mask=n < T, other=-1)
    cells, x, to = tl.where(wants_k, ds, p), tl.where(wants_k, q, dout), tl.where(wants_k, dk, dv)
    x_t, x_h = tl.where(wants_k, q_t, do_t), tl.where(wants_k, q_h, do_h)
    width: tl.constexpr = K if K < F else F
    size = _cells_before(tl.cdiv(T, B), WIDE, B).to(tl.int64)
    acc = tl.zeros((N, F), tl.float32)
    before, whole, behind = query_blocks(spans + T, start, T, M, N)
    for member in range(0, GROUP):
        of_head = cells + (part * GROUP + member) * size
        rows = x + (own * GROUP + member) * x_h + feature
        acc = _product_blocks(acc, of_head, rows, x_t, n, last_N, start, before, whole, whole, T, WIDE, False, M, B, F, width)
        others = before + behind
        acc = _product_blocks(acc, of_head, rows, x_t, n, last_N, start, before, whole, others, T, WIDE, True, M, B, F, width)
    store_rows(to + own * K + feature, acc * tl.where(wants_k, scale, 1.0), start, G * K, T, N, width, F)


def stored_backward(
    given: tuple[Tensor, ...], out: Tensor, lse: Tensor, spans: Tensor, grads: tuple[Tensor, ...], heads: int, longest: int,
    scores: Tile, products: Tile, common: dict[str, Any],
) -> None:  # fmt: skip
    """Fill grads, which are dq, dk and dv, `heads` query heads at a time. given: dout, q, k, v.

    `heads` is a multiple of a key/value head's query heads. longest: no query sees more keys. Both tiles
    divide SCORE_BLOCK.
    """
    (dout, q, k, _), (dq, dk, dv) = given, grads
    (num_tokens, num_heads, head_dim), groups, group = q.shape, k.shape[1], common["GROUP"]
    p, ds = torch.empty((2, heads, compute_limits.score_cells(num_tokens, longest)), dtype=q.dtype, device=q.device)
    wide = compute_limits.score_blocks(longest)
    strides = [stride for x in given for stride in x.stride()[:2]]
    (m, n, warps, stages), (rows, keys, key_warps, key_stages) = scores, products
    features = min(common["P"], MOST_FEATURES)
    for first in range(0, num_heads, heads):
        part = min(heads, num_heads - first)
        _scores_kernel[(triton.cdiv(num_tokens, m) * part,)](
            *given, out, lse, spans, dq, p, ds, *strides, num_tokens, wide, first, part, **common,
            H=num_heads, WANT_Q=True, M=m, N=n, B=compute_limits.SCORE_BLOCK, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        grid = (triton.cdiv(num_tokens, keys) * part // group * triton.cdiv(head_dim, features) * 2,)
        _products_kernel[grid](
            p, ds, q, dout, spans, dk, dv, *strides[2:4], *strides[:2], num_tokens, wide,
            first // group, part // group, common["scale"],
            G=groups, GROUP=group, M=rows, N=keys, B=compute_limits.SCORE_BLOCK, F=features, K=head_dim,
            num_warps=key_warps, num_stages=key_stages,
        )  # fmt: skip
