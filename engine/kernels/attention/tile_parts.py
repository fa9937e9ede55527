"""Hold what the attention kernels share: a tile's rows, its scores, and the blocks that it meets.

Shape letters: T tokens, K head dim, P K padded to a power of two, M queries and N keys of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(x, start, stride, T, MASKED: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, P: tl.constexpr):
    """Return rows [ROWS, P] of one head from `start`; what lies beyond T (if MASKED) or K is zero."""
    row, feature = tl.arange(0, ROWS)[:, None], tl.arange(0, P)[None, :]
    at = x + start.to(tl.int64) * stride + row * stride + feature
    if MASKED:
        return tl.load(at, mask=(row < T - start) & (feature < K), other=0.0)
    if K < P:
        return tl.load(at, mask=feature < K, other=0.0)
    return tl.load(at)


@triton.jit
def store_rows(x, value, start, stride, T, ROWS: tl.constexpr, K: tl.constexpr, P: tl.constexpr):
    row, feature = tl.arange(0, ROWS)[:, None], tl.arange(0, P)[None, :]
    at = x + start.to(tl.int64) * stride + row * stride + feature
    tl.store(at, value.to(x.dtype.element_ty), mask=(row < T - start) & (feature < K))


@triton.jit
def capped_logits(s, scale, softcap, CAP: tl.constexpr):
    """Return z * log2(e), where z is the scaled and capped score, and dz / d(scale * s).

    tanh(u) = (1 - e) / (1 + e) with e = exp(-2 u), at most 2^126 so that nothing overflows. The slope
    4 e / (1 + e)^2 loses no digits.
    """
    if CAP:
        e = tl.exp2(tl.minimum(s * (-2.0 * LOG2_E * scale / softcap), 126.0, propagate_nan=tl.PropagateNan.ALL))
        r = 1.0 / (1.0 + e)
        return (1.0 - e) * r * (softcap * LOG2_E), 4.0 * (e * r) * r
    else:
        return s * (scale * LOG2_E), 1.0


@triton.jit
def key_blocks(first, start, T, ALIGNED: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Return the first key of a query block, and its numbers of key blocks.

    They are those before the whole ones, which some query does not see from their beginning; the
    whole ones; and those behind them, which cross the diagonal. If ALIGNED, N divides the first key.
    """
    end = tl.minimum(start + M, T)
    begin, latest = tl.load(first + start), tl.load(first + end - 1)
    if ALIGNED:
        begin = begin // N * N
    total = tl.cdiv(end - begin, N)
    before = tl.minimum(tl.cdiv(latest - begin, N), total)
    whole = tl.maximum((start + 1 - begin) // N - before, 0)
    return begin, before, whole, total - before - whole


@triton.jit
def query_blocks(last, start, T, M: tl.constexpr, N: tl.constexpr):
    """Return the numbers of query blocks of a key block, the first of which begins at the block's first key.

    They are those that cross the diagonal; the whole ones; and those behind them.
    """
    end = tl.minimum(start + N, T)
    total = tl.cdiv(tl.load(last + end - 1) + 1 - start, M)
    before = tl.minimum(tl.cdiv(end - 1 - start, M), total)
    whole = tl.maximum((tl.load(last + start) + 1 - start) // M - before, 0)
    return before, whole, total - before - whole
