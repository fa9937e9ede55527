"""Apply rotary position embedding in Triton, in place.

One program rotates all query and key heads of one token. It reads cos and sin once per token
instead of once per head, and only their first half.

Shape letters: T tokens, H query heads, G key/value heads, K head dim, R features of a head that
rotate.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _half_heads(
    x, HEADS: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, STEP: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Return pointers [BLOCK_HEADS, BLOCK_HALF] to the first feature of each pair, and their mask."""
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    i = tl.arange(0, BLOCK_HALF)[None, :]
    return x + head * K + i * STEP, (head < HEADS) & (i < HALF)


@triton.jit
def _turn(first, second, c, s):
    a, b = first.to(tl.float32), second.to(tl.float32)
    return (a * c - b * s).to(first.dtype), (b * c + a * s).to(first.dtype)


@triton.jit
def _rope_kernel(
    q, k, cos, sin, q_stride, k_stride, cos_stride, sin_stride,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, STEP: tl.constexpr, AWAY: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_HALF: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Write (a, b) <- (a cos - b sin, b cos + a sin) for the features a, b of each pair.

    Pairs are STEP features apart, and b is AWAY features from a. All loads come before the first store.
    """
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_HALF)
    c = tl.load(cos + token * cos_stride + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * sin_stride + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        s = -s
    q_at, q_inside = _half_heads(q + token * q_stride, H, K, HALF, STEP, BLOCK_H, BLOCK_HALF)
    k_at, k_inside = _half_heads(k + token * k_stride, G, K, HALF, STEP, BLOCK_G, BLOCK_HALF)
    q_first, q_second = tl.load(q_at, mask=q_inside, other=0.0), tl.load(q_at + AWAY, mask=q_inside, other=0.0)
    k_first, k_second = tl.load(k_at, mask=k_inside, other=0.0), tl.load(k_at + AWAY, mask=k_inside, other=0.0)
    q_first, q_second = _turn(q_first, q_second, c, s)
    k_first, k_second = _turn(k_first, k_second, c, s)
    tl.store(q_at, q_first, mask=q_inside)
    tl.store(q_at + AWAY, q_second, mask=q_inside)
    tl.store(k_at, k_first, mask=k_inside)
    tl.store(k_at + AWAY, k_second, mask=k_inside)


def rope_(q_THK: Tensor, k_TGK: Tensor, cos_TR: Tensor, sin_TR: Tensor, inverse: bool = False, pairs: bool = False) -> None:
    num_tokens, num_q, head_dim = q_THK.shape
    num_k, half = k_TGK.shape[1], cos_TR.shape[1] // 2
    if not num_tokens or not half:
        return
    block_h, block_g, block_half = (triton.next_power_of_2(max(1, n)) for n in (num_q, num_k, half))
    _rope_kernel[(num_tokens,)](
        q_THK, k_TGK, cos_TR, sin_TR, q_THK.stride(0), k_TGK.stride(0), cos_TR.stride(0), sin_TR.stride(0),
        H=num_q, G=num_k, K=head_dim, HALF=half, STEP=2 if pairs else 1, AWAY=1 if pairs else half,
        BLOCK_H=block_h, BLOCK_G=block_g, BLOCK_HALF=block_half, INVERSE=inverse,
        num_warps=min(8, max(1, block_h * block_half // 512)),
    )  # fmt: skip
