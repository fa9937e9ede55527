"""Apply rotary position embedding in Triton, in place.

One program rotates all query and key heads of one token. It reads cos and sin once per token
instead of once per head, and only their first half.

Shape letters: T tokens, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _half_heads(x, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """Return pointers [BLOCK_HEADS, BLOCK_HALF] to the first halves of heads, and their mask."""
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    i = tl.arange(0, BLOCK_HALF)[None, :]
    return x + head * (2 * HALF) + i, (head < HEADS) & (i < HALF)


@triton.jit
def _turn(first, second, c, s):
    a, b = first.to(tl.float32), second.to(tl.float32)
    return (a * c - b * s).to(first.dtype), (b * c + a * s).to(first.dtype)


@triton.jit
def _rope_kernel(
    q, k, cos, sin, q_stride, k_stride, cos_stride, sin_stride,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_HALF: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Write (a, b) <- (a cos - b sin, b cos + a sin) for the halves a, b of each head.

    All loads come before the first store.
    """
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_HALF)
    c = tl.load(cos + token * cos_stride + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * sin_stride + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        s = -s
    q_at, q_inside = _half_heads(q + token * q_stride, H, HALF, BLOCK_H, BLOCK_HALF)
    k_at, k_inside = _half_heads(k + token * k_stride, G, HALF, BLOCK_G, BLOCK_HALF)
    q_first, q_second = tl.load(q_at, mask=q_inside, other=0.0), tl.load(q_at + HALF, mask=q_inside, other=0.0)
    k_first, k_second = tl.load(k_at, mask=k_inside, other=0.0), tl.load(k_at + HALF, mask=k_inside, other=0.0)
    q_first, q_second = _turn(q_first, q_second, c, s)
    k_first, k_second = _turn(k_first, k_second, c, s)
    tl.store(q_at, q_first, mask=q_inside)
    tl.store(q_at + HALF, q_second, mask=q_inside)
    tl.store(k_at, k_first, mask=k_inside)
    tl.store(k_at + HALF, k_second, mask=k_inside)


def rope_(q_THK: Tensor, k_TGK: Tensor, cos_TK: Tensor, sin_TK: Tensor, inverse: bool = False) -> None:
    num_tokens, num_q, head_dim = q_THK.shape
    num_k = k_TGK.shape[1]
    if not num_tokens:
        return
    block_h, block_g, block_half = (triton.next_power_of_2(n) for n in (num_q, num_k, head_dim // 2))
    _rope_kernel[(num_tokens,)](
        q_THK, k_TGK, cos_TK, sin_TK, q_THK.stride(0), k_TGK.stride(0), cos_TK.stride(0), sin_TK.stride(0),
        H=num_q, G=num_k, HALF=head_dim // 2, BLOCK_H=block_h, BLOCK_G=block_g, BLOCK_HALF=block_half, INVERSE=inverse,
        num_warps=min(8, max(1, block_h * block_half // 512)),
    )  # fmt: skip
