"""Compute causal attention over packed samples in Triton, forward and backward, with a softcap.

It is the algorithm of FlashAttention-2 (Dao, 2023, arXiv:2307.08691): scores exist only as tiles,
the softmax is rescaled while keys pass, and the backward pass makes the scores again from the
log-sum-exp. What differs:

- A query sees the keys from `first` to itself, and a key is seen by the queries from itself to
  `last`. Both arrays never fall along the row, so samples and a window become one interval. Tiles
  may cross samples, and the grid depends on the number of tokens alone. The offsets are read on the
  device, so a CUDA graph may replay with others.
- Tiles that every query of the block sees whole need no mask. They run in a loop of their own.
- The gradients take three kernels without atomics, so a result repeats bit for bit: dq (which also
  stores sum(dout * out)), dv and dk. Each makes the scores again. Heads of up to 128 features have
  registers for dk and dv in one kernel.
- A kernel for keys goes over the query heads of its group, so nothing is repeated in memory.

Shape letters: T tokens, H query heads, G key/value heads, K head dim. P is K padded to a power of
two, M and N are the tile's queries and keys.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.attention.attention_tiles import TINY, AttentionTiles, Tile, choose_tiles
from engine.kernels.attention.stored_scores import stored_backward
from engine.kernels.attention.tile_parts import LN_2, LOG2_E, capped_logits, key_blocks, load_rows, query_blocks, store_rows
from engine.shape.compute_limits import heads_with_stored_scores

LOWEST = tl.constexpr(-1e30)  # a maximum before the first key; -inf would make -inf - (-inf)
SPAN_BLOCK = 256
MOST_BOUND = 60.0  # exp(60) and exp(-60) and their sums are numbers in fp32, and the first two in bf16


@triton.jit
def _spans_kernel(offsets, spans, num_offsets, T, window, BITS: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Write each token's first key and last query: bisect the offsets, then cut to the window."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.zeros((BLOCK,), tl.int32)
    for bit in tl.static_range(BITS):
        further = at + (1 << (BITS - 1 - bit))
        offset = tl.load(offsets + further, mask=further < num_offsets, other=2147483647)
        at = tl.where(offset <= t, further, at)
    first = tl.load(offsets + at).to(tl.int32)
    last = tl.load(offsets + at + 1, mask=at + 1 < num_offsets, other=T).to(tl.int32) - 1
    if WINDOW:
        first = tl.maximum(first, t - window + 1)
        last = tl.minimum(last, t + window - 1)
    tl.store(spans + t, first, mask=t < T)
    tl.store(spans + T + t, tl.minimum(last, T - 1), mask=t < T)


@triton.jit
def _forward_blocks(
    acc, top, total, taken, q, k, v, k_stride, v_stride, t, first_M, begin, before, whole, count, T, scale, softcap,
    MASKED: tl.constexpr, CAP: tl.constexpr, BOUND: tl.constexpr, N: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Add `count` key blocks to the softmax; if MASKED, those around the whole ones.

    BOUND scores need no maximum, so `top` stays as it is and nothing is scaled again. Their weights are
    not 1 at the largest score, so rounding moves all of them: `taken` is the sum of the rounded ones.
    """
    for i in range(0, count):
        if MASKED:
            start = begin + tl.where(i < before, i, i + whole) * N
        else:
            start = begin + (i + before) * N
        n = start + tl.arange(0, N)
        s = tl.dot(q, tl.trans(load_rows(k, start, k_stride, T, MASKED, N, K, P)), input_precision="ieee")
        z, _ = capped_logits(s, scale, softcap, CAP)
        if MASKED:
            z = tl.where((n[None, :] >= first_M[:, None]) & (n[None, :] <= t[:, None]), z, float("-inf"))
        if not BOUND:
            higher = tl.maximum(top, tl.max(z, 1))
            shrink = tl.exp2(top - higher)
            acc, total, top = acc * shrink[:, None], total * shrink, higher
        p = tl.exp2(z - top[:, None])
        total += tl.sum(p, 1)
        v_NP = load_rows(v, start, v_stride, T, MASKED, N, K, P)
        weights = p.to(v_NP.dtype)
        if BOUND:
            taken += tl.sum(weights.to(tl.float32), 1)
        acc = tl.dot(weights, v_NP, acc, input_precision="ieee")
    return acc, top, total, taken


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    q, k, v, spans, out, lse, q_t, q_h, k_t, k_h, v_t, v_h, T, scale, softcap,
    H: tl.constexpr, GROUP: tl.constexpr, CAP: tl.constexpr, BOUND: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Write out and log-sum-exp of one query block of one head; late blocks, which take longest, come first."""
    head = tl.program_id(0) % H
    start = (tl.cdiv(T, M) - 1 - tl.program_id(0) // H) * M
    t = start + tl.arange(0, M)
    first_M = tl.load(spans + t, mask=t < T, other=0)
    q += head * q_h
    k += head // GROUP * k_h
    v += head // GROUP * v_h
    q_MP = load_rows(q, start, q_t, T, True, M, K, P)
    acc, total, taken = tl.zeros((M, P), tl.float32), tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32)
    top = tl.full((M,), 0.0 if BOUND else LOWEST, tl.float32)
    begin, before, whole, behind = key_blocks(spans, start, T, False, M, N)
    acc, top, total, taken = _forward_blocks(
        acc, top, total, taken, q_MP, k, v, k_t, v_t, t, first_M, begin, before, whole, whole, T, scale, softcap,
        False, CAP, BOUND, N, K, P,
    )  # fmt: skip
    acc, top, total, taken = _forward_blocks(
        acc, top, total, taken, q_MP, k, v, k_t, v_t, t, first_M, begin, before, whole, before + behind, T, scale, softcap,
        True, CAP, BOUND, N, K, P,
    )  # fmt: skip
    divisor = taken if BOUND else total
    store_rows(out + head * K, acc / divisor[:, None], start, H * K, T, M, K, P)
    tl.store(lse + head.to(tl.int64) * T + t, (top + tl.log2(total)) * LN_2, mask=t < T)


@triton.jit
def _dq_blocks(
    dq, q, dout, k, v, k_stride, v_stride, lse_M, delta_M, t, first_M, begin, before, whole, count, T, scale, softcap,
    MASKED: tl.constexpr, CAP: tl.constexpr, N: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    for i in range(0, count):
        if MASKED:
            start = begin + tl.where(i < before, i, i + whole) * N
        else:
            start = begin + (i + before) * N
        n = start + tl.arange(0, N)
        k_NP = load_rows(k, start, k_stride, T, MASKED, N, K, P)
        z, slope = capped_logits(tl.dot(q, tl.trans(k_NP), input_precision="ieee"), scale, softcap, CAP)
        p = tl.exp2(z - lse_M[:, None])
        if MASKED:
            p = tl.where((n[None, :] >= first_M[:, None]) & (n[None, :] <= t[:, None]), p, 0.0)
        dp = tl.dot(dout, tl.trans(load_rows(v, start, v_stride, T, MASKED, N, K, P)), input_precision="ieee")
        ds = p * (dp - delta_M[:, None]) * slope
        dq = tl.dot(ds.to(k_NP.dtype), k_NP, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["T"])
def _dq_kernel(
    dout, q, k, v, out, lse, spans, dq, delta, do_t, do_h, q_t, q_h, k_t, k_h, v_t, v_h, T, scale, softcap,
    H: tl.constexpr, GROUP: tl.constexpr, CAP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Write dq and delta = sum(dout * out) of one query block of one head."""
    head = tl.program_id(0) % H
    start = (tl.cdiv(T, M) - 1 - tl.program_id(0) // H) * M
    t = start + tl.arange(0, M)
    first_M = tl.load(spans + t, mask=t < T, other=0)
    k += head // GROUP * k_h
    v += head // GROUP * v_h
    do_MP = load_rows(dout + head * do_h, start, do_t, T, True, M, K, P)
    out_MP = load_rows(out + head * K, start, H * K, T, True, M, K, P)
    delta_M = tl.sum(do_MP.to(tl.float32) * out_MP.to(tl.float32), 1)
    at_M = head.to(tl.int64) * T + t
    tl.store(delta + at_M, delta_M, mask=t < T)
    lse_M = tl.load(lse + at_M, mask=t < T, other=0.0) * LOG2_E
    q_MP = load_rows(q + head * q_h, start, q_t, T, True, M, K, P)
    acc = tl.zeros((M, P), tl.float32)
    begin, before, whole, behind = key_blocks(spans, start, T, False, M, N)
    acc = _dq_blocks(
        acc, q_MP, do_MP, k, v, k_t, v_t, lse_M, delta_M, t, first_M, begin, before, whole, whole, T, scale, softcap,
        False, CAP, N, K, P,
    )  # fmt: skip
    acc = _dq_blocks(
        acc, q_MP, do_MP, k, v, k_t, v_t, lse_M, delta_M, t, first_M, begin, before, whole, before + behind, T, scale, softcap,
        True, CAP, N, K, P,
    )  # fmt: skip
    store_rows(dq + head * K, acc * scale, start, H * K, T, M, K, P)


@triton.jit
def _key_gradient_blocks(
    dk, dv, k, v, q, dout, lse, delta, q_stride, do_stride, n, last_N, start_N, before, whole, count, T, scale, softcap,
    MASKED: tl.constexpr, CAP: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Add `count` query blocks to dk and dv; scores are [N, M] here, so that no tile is transposed in registers."""
    for i in range(0, count):
        if MASKED:
            start = start_N + tl.where(i < before, i, i + whole) * M
        else:
            start = start_N + (i + before) * M
        t = start + tl.arange(0, M)
        q_MP = load_rows(q, start, q_stride, T, MASKED, M, K, P)
        z, slope = capped_logits(tl.dot(k, tl.trans(q_MP), input_precision="ieee"), scale, softcap, CAP)
        if MASKED:
            lse_M = tl.load(lse + t, mask=t < T, other=0.0) * LOG2_E
        else:
            lse_M = tl.load(lse + t) * LOG2_E
        p = tl.exp2(z - lse_M[None, :])
        if MASKED:
            p = tl.where((t[None, :] >= n[:, None]) & (t[None, :] <= last_N[:, None]), p, 0.0)
        do_MP = load_rows(dout, start, do_stride, T, MASKED, M, K, P)
        if WANT_V:
            dv = tl.dot(p.to(do_MP.dtype), do_MP, dv, input_precision="ieee")
        if WANT_K:
            if MASKED:
                delta_M = tl.load(delta + t, mask=t < T, other=0.0)
            else:
                delta_M = tl.load(delta + t)
            dp = tl.dot(v, tl.trans(do_MP), input_precision="ieee")
            ds = p * (dp - delta_M[None, :]) * slope
            dk = tl.dot(ds.to(q_MP.dtype), q_MP, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["T"])
def _key_gradient_kernel(
    dout, q, k, v, lse, spans, delta, dk, dv, do_t, do_h, q_t, q_h, k_t, k_h, v_t, v_h, T, scale, softcap,
    G: tl.constexpr, GROUP: tl.constexpr, CAP: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Write dk, dv or both of one key block of one key/value head; early blocks, which take longest, come first."""
    own = tl.program_id(0) % G
    start = tl.program_id(0) // G * N
    n = start + tl.arange(0, N)
    last_N = tl.load(spans + T + n, mask=n < T, other=-1)
    k_NP = load_rows(k + own * k_h, start, k_t, T, True, N, K, P)
    v_NP = k_NP
    dk_NP = tl.zeros((N, P), tl.float32) if WANT_K else 0.0
    dv_NP = tl.zeros((N, P), tl.float32) if WANT_V else 0.0
    if WANT_K:
        v_NP = load_rows(v + own * v_h, start, v_t, T, True, N, K, P)
    before, whole, behind = query_blocks(spans + T, start, T, M, N)
    for member in range(0, GROUP):
        head = own * GROUP + member
        per_token = head.to(tl.int64) * T
        dk_NP, dv_NP = _key_gradient_blocks(
            dk_NP, dv_NP, k_NP, v_NP, q + head * q_h, dout + head * do_h, lse + per_token, delta + per_token, q_t, do_t,
            n, last_N, start, before, whole, whole, T, scale, softcap, False, CAP, WANT_K, WANT_V, M, K, P,
        )  # fmt: skip
        dk_NP, dv_NP = _key_gradient_blocks(
            dk_NP, dv_NP, k_NP, v_NP, q + head * q_h, dout + head * do_h, lse + per_token, delta + per_token, q_t, do_t,
            n, last_N, start, before, whole, before + behind, T, scale, softcap, True, CAP, WANT_K, WANT_V, M, K, P,
        )  # fmt: skip
    if WANT_K:
        store_rows(dk + own * K, dk_NP * scale, start, G * K, T, N, K, P)
    if WANT_V:
        store_rows(dv + own * K, dv_NP, start, G * K, T, N, K, P)


def document_spans(offsets: Tensor, num_tokens: int, window: int | None) -> Tensor:
    spans_2T = torch.empty((2, num_tokens), dtype=torch.int32, device=offsets.device)
    if num_tokens:
        number = offsets.shape[0]
        _spans_kernel[(triton.cdiv(num_tokens, SPAN_BLOCK),)](
            offsets, spans_2T, number, num_tokens, window or 0, BITS=number.bit_length(), WINDOW=window is not None,
            BLOCK=SPAN_BLOCK,
        )  # fmt: skip
    return spans_2T


def attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, spans_2T: Tensor, scale: float, softcap: float | None = None,
    tiles: AttentionTiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_tokens, num_heads, _ = q_THK.shape
    out_THK = torch.empty(q_THK.shape, dtype=q_THK.dtype, device=q_THK.device)
    lse_HT = torch.empty((num_heads, num_tokens), dtype=torch.float32, device=q_THK.device)
    if num_tokens:
        m, n, warps, stages = (tiles or _tiles(q_THK)).forward
        bound = softcap is not None and softcap <= MOST_BOUND and q_THK.dtype != torch.float16
        _forward_kernel[(triton.cdiv(num_tokens, m) * num_heads,)](
            q_THK, k_TGK, v_TGK, spans_2T, out_THK, lse_HT, *_strides(q_THK, k_TGK, v_TGK), num_tokens,
            **_common(q_THK, k_TGK, scale, softcap), H=num_heads, BOUND=bound, M=m, N=n, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out_THK, lse_HT


def attention_backward(
    dout_THK: Tensor, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, out_THK: Tensor, lse_HT: Tensor, spans_2T: Tensor,
    scale: float, softcap: float | None = None, longest: int | None = None, tiles: AttentionTiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_THK, k_TGK, v_TGK))
    num_tokens, num_heads, head_dim = q_THK.shape
    if not num_tokens:
        return dq, dk, dv
    tiles, given, common = tiles or _tiles(q_THK), (dout_THK, q_THK, k_TGK, v_TGK), _common(q_THK, k_TGK, scale, softcap)
    longest = min(longest or num_tokens, num_tokens)
    heads = heads_with_stored_scores(num_tokens, longest, num_heads, k_TGK.shape[1], head_dim, q_THK.element_size())
    if heads and tiles.scores and tiles.products:
        stored_backward(
            given, out_THK, lse_HT, spans_2T, (dq, dk, dv), heads, longest, tiles.scores, tiles.products, common
        )  # fmt: skip
        return dq, dk, dv
    delta_HT = torch.empty_like(lse_HT)
    launch_dq(tiles.dq, given, out_THK, lse_HT, spans_2T, dq, delta_HT, common)
    for tile, wanted in ((tiles.both, "kv"),) if tiles.both else ((tiles.dv, "v"), (tiles.dk, "k")):
        launch_dk_dv(tile, wanted, given, lse_HT, spans_2T, dk, dv, delta_HT, common)
    return dq, dk, dv


def launch_dq(
    tile: Tile, given: tuple[Tensor, ...], out: Tensor, lse: Tensor, spans: Tensor, dq: Tensor, delta: Tensor,
    common: dict[str, Any],
) -> None:  # fmt: skip
    """Fill dq and delta. given: dout, q, k, v."""
    (num_tokens, num_heads, _), (m, n, warps, stages) = dq.shape, tile
    _dq_kernel[(triton.cdiv(num_tokens, m) * num_heads,)](
        *given, out, lse, spans, dq, delta, *_strides(*given), num_tokens, **common,
        H=num_heads, M=m, N=n, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def launch_dk_dv(
    tile: Tile, wanted: str, given: tuple[Tensor, ...], lse: Tensor, spans: Tensor, dk: Tensor, dv: Tensor, delta: Tensor,
    common: dict[str, Any],
) -> None:  # fmt: skip
    """Fill dk if "k" is wanted and dv if "v" is. given: dout, q, k, v."""
    (num_tokens, groups, _), (m, n, warps, stages) = dk.shape, tile
    _key_gradient_kernel[(triton.cdiv(num_tokens, n) * groups,)](
        *given, lse, spans, delta, dk, dv, *_strides(*given), num_tokens, **common,
        G=groups, WANT_K="k" in wanted, WANT_V="v" in wanted, M=m, N=n, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _common(q_THK: Tensor, k_TGK: Tensor, scale: float, softcap: float | None) -> dict[str, Any]:
    head_dim = q_THK.shape[-1]
    return {
        "scale": float(scale), "softcap": float(softcap or 1.0), "CAP": softcap is not None,
        "GROUP": q_THK.shape[1] // k_TGK.shape[1], "K": head_dim, "P": max(16, triton.next_power_of_2(head_dim)),
    }  # fmt: skip


def _tiles(q_THK: Tensor) -> AttentionTiles:
    if not q_THK.is_cuda or q_THK.element_size() != 2:
        return TINY
    shared = torch.cuda.get_device_properties(q_THK.device).shared_memory_per_block_optin
    return choose_tiles(q_THK.shape[-1], shared)
