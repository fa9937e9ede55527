"""Apply rotary position embedding in Triton, in place or into a buffer with the values behind.

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
def half_heads(
    x, HEADS: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, STEP: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Return pointers [BLOCK_HEADS, BLOCK_HALF] to the first feature of each pair, and their mask."""
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    i = tl.arange(0, BLOCK_HALF)[None, :]
    return x + head * K + i * STEP, (head < HEADS) & (i < HALF)


@triton.jit
def turn(first, second, c, s):
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
    q_at, q_inside = half_heads(q + token * q_stride, H, K, HALF, STEP, BLOCK_H, BLOCK_HALF)
    k_at, k_inside = half_heads(k + token * k_stride, G, K, HALF, STEP, BLOCK_G, BLOCK_HALF)
    q_first, q_second = tl.load(q_at, mask=q_inside, other=0.0), tl.load(q_at + AWAY, mask=q_inside, other=0.0)
    k_first, k_second = tl.load(k_at, mask=k_inside, other=0.0), tl.load(k_at + AWAY, mask=k_inside, other=0.0)
    q_first, q_second = turn(q_first, q_second, c, s)
    k_first, k_second = turn(k_first, k_second, c, s)
    tl.store(q_at, q_first, mask=q_inside)
    tl.store(q_at + AWAY, q_second, mask=q_inside)
    tl.store(k_at, k_first, mask=k_inside)
    tl.store(k_at + AWAY, k_second, mask=k_inside)


@triton.jit
def _join_kernel(
    q, k, v, out, cos, sin, q_stride, k_stride, v_stride, cos_stride, sin_stride,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HALF: tl.constexpr, STEP: tl.constexpr,
    AWAY: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_V: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """Write what `_rope_kernel` would write in place, and V values, side by side in `out`. All of a head rotates."""
    token = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, BLOCK_HALF), tl.arange(0, BLOCK_V)
    c = tl.load(cos + token * cos_stride + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * sin_stride + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        s = -s
    q_at, q_inside = half_heads(q + token * q_stride, H, K, HALF, STEP, BLOCK_H, BLOCK_HALF)
    k_at, k_inside = half_heads(k + token * k_stride, G, K, HALF, STEP, BLOCK_G, BLOCK_HALF)
    q_first, q_second = tl.load(q_at, mask=q_inside, other=0.0), tl.load(q_at + AWAY, mask=q_inside, other=0.0)
    k_first, k_second = tl.load(k_at, mask=k_inside, other=0.0), tl.load(k_at + AWAY, mask=k_inside, other=0.0)
    values = tl.load(v + token * v_stride + j, mask=j < V, other=0.0)
    q_first, q_second = turn(q_first, q_second, c, s)
    k_first, k_second = turn(k_first, k_second, c, s)
    out += token * ((H + G) * K + V)
    q_to, _ = half_heads(out, H, K, HALF, STEP, BLOCK_H, BLOCK_HALF)
    k_to, _ = half_heads(out + H * K, G, K, HALF, STEP, BLOCK_G, BLOCK_HALF)
    tl.store(q_to, q_first, mask=q_inside)
    tl.store(q_to + AWAY, q_second, mask=q_inside)
    tl.store(k_to, k_first, mask=k_inside)
    tl.store(k_to + AWAY, k_second, mask=k_inside)
    tl.store(out + (H + G) * K + j, values, mask=j < V)


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


def join_rotated(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, cos_TK: Tensor, sin_TK: Tensor, inverse: bool = False, pairs: bool = False
) -> Tensor:
    width, options = join_options(q_THK, k_TGK, v_TGK, inverse, pairs)
    out = q_THK.new_empty(q_THK.shape[0], width)
    if len(out):
        strides = (x.stride(0) for x in (q_THK, k_TGK, v_TGK, cos_TK, sin_TK))
        _join_kernel[(len(out),)](q_THK, k_TGK, v_TGK, out, cos_TK, sin_TK, *strides, **options)
    return out


def join_options(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, inverse: bool, pairs: bool) -> tuple[int, dict[str, int]]:
    """Return the features of q, k and v side by side, and the launch options of a kernel that joins them."""
    (_, num_q, head_dim), num_k, width_v, half = q_THK.shape, k_TGK.shape[1], v_TGK.shape[1] * v_TGK.shape[2], q_THK.shape[2] // 2
    block_h, block_g, block_half, block_v = (triton.next_power_of_2(n) for n in (num_q, num_k, half, width_v))
    options = {
        "H": num_q, "G": num_k, "K": head_dim, "V": width_v, "HALF": half, "STEP": 2 if pairs else 1,
        "AWAY": 1 if pairs else half, "BLOCK_H": block_h, "BLOCK_G": block_g, "BLOCK_HALF": block_half, "BLOCK_V": block_v,
        "INVERSE": inverse, "num_warps": min(8, max(1, block_h * block_half // 512)),
    }  # fmt: skip
    return (num_q + num_k) * head_dim + width_v, options
