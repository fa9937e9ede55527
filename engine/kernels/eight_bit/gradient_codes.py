"""Compute gradients and their int8 codes in one pass, in Triton: of a gated linear unit, and of rotated heads.

The product of the input gradient reads such a gradient in codes, with one scale for each token. A
program holds a whole token in registers, so it knows the scale before it writes. That saves reading
the gradient again. A token that registers do not hold takes two kernels, and gives the same.

Shape letters: T tokens, F MLP hidden, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.eight_bit.int8_reference import Int8Rows
from engine.kernels.eight_bit.row_codes import INFINITE_BITS, quantize_rows, size_bits
from engine.kernels.eight_bit.unpacking_parts import code_bits
from engine.kernels.gated import activate, glu_backward_
from engine.kernels.rope import half_heads, join_options, join_rotated, turn

WIDEST = 16_384  # F of a token that registers hold: 16 elements of each of three tensors a thread
WIDEST_HEADS = 16_384  # features of a token's queries, keys and values


@triton.jit
def _scale(sizes):
    """Return the scale of a token and its inverse, from the largest of its values' `size_bits`; infinite if one is not finite."""
    limit = tl.minimum(sizes, INFINITE_BITS).to(tl.float32, bitcast=True)
    scale = tl.maximum(limit, 1e-30) * 0.007874015748031496  # SMALLEST_LIMIT and INVERSE
    return scale, tl.div_rn(1.0, scale)


@triton.jit
def _gated_kernel(dh, gate_up, codes, scales, dh_stride, stride, F, GELU: tl.constexpr, BLOCK_F: tl.constexpr):
    """Write gate | up <- dgate | dup, dh <- h, and the codes of dgate | dup with their scale, of one token."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, BLOCK_F)
    inside = f < F
    dh += row * dh_stride
    gate_up += row * stride
    codes += row * 2 * F
    d = tl.load(dh + f, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate_up + f, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gate_up + F + f, mask=inside, other=0.0).to(tl.float32)
    act, slope = activate(g, GELU)
    dgate, dup = (d * u * slope).to(gate_up.dtype.element_ty), (d * act).to(gate_up.dtype.element_ty)
    tl.store(dh + f, (act * u).to(dh.dtype.element_ty), mask=inside)
    tl.store(gate_up + f, dgate, mask=inside)
    tl.store(gate_up + F + f, dup, mask=inside)
    dgate, dup = dgate.to(tl.float32), dup.to(tl.float32)
    scale, inverse = _scale(tl.max(tl.maximum(size_bits(dgate), size_bits(dup))))
    tl.store(scales + row, scale)
    tl.store(codes + f, code_bits(dgate, inverse).to(tl.int8), mask=inside)
    tl.store(codes + F + f, code_bits(dup, inverse).to(tl.int8), mask=inside)


def glu_backward_codes_(dh_TF: Tensor, gate_up_TF2: Tensor, activation: str) -> Int8Rows:
    num_tokens, width = dh_TF.shape
    if width > WIDEST:
        glu_backward_(dh_TF, *gate_up_TF2.chunk(2, dim=1), activation)
        return quantize_rows(gate_up_TF2, is_rotated=False)
    codes = torch.empty((num_tokens, 2 * width), dtype=torch.int8, device=dh_TF.device)
    scale_T = torch.empty(num_tokens, dtype=torch.float32, device=dh_TF.device)
    if num_tokens:
        block = triton.next_power_of_2(width)
        _gated_kernel[(num_tokens,)](
            dh_TF, gate_up_TF2, codes, scale_T, dh_TF.stride(0), gate_up_TF2.stride(0), width,
            GELU=activation == "gelu_tanh", BLOCK_F=block, num_warps=min(32, max(1, block // 512)),
        )  # fmt: skip
    return Int8Rows(codes, scale_T)


@triton.jit
def _heads_kernel(
    q, k, v, out, cos, sin, codes, scales, q_stride, k_stride, v_stride, cos_stride, sin_stride,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HALF: tl.constexpr, STEP: tl.constexpr,
    AWAY: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_V: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """Write what `join_rotated` returns, and its codes with their scale, of one token."""
    token = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, BLOCK_HALF), tl.arange(0, BLOCK_V)
    c = tl.load(cos + token * cos_stride + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * sin_stride + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        s = -s
    q_at, q_inside = half_heads(q + token * q_stride, H, K, HALF, STEP, BLOCK_H, BLOCK_HALF)
    k_at, k_inside = half_heads(k + token * k_stride, G, K, HALF, STEP, BLOCK_G, BLOCK_HALF)
    q_one, q_two = tl.load(q_at, mask=q_inside, other=0.0), tl.load(q_at + AWAY, mask=q_inside, other=0.0)
    k_one, k_two = tl.load(k_at, mask=k_inside, other=0.0), tl.load(k_at + AWAY, mask=k_inside, other=0.0)
    values = tl.load(v + token * v_stride + j, mask=j < V, other=0.0)
    q_one, q_two = turn(q_one, q_two, c, s)
    k_one, k_two = turn(k_one, k_two, c, s)
    out += token * ((H + G) * K + V)
    codes += token * ((H + G) * K + V)
    q_to, _ = half_heads(out, H, K, HALF, STEP, BLOCK_H, BLOCK_HALF)
    k_to, _ = half_heads(out + H * K, G, K, HALF, STEP, BLOCK_G, BLOCK_HALF)
    tl.store(q_to, q_one, mask=q_inside)
    tl.store(q_to + AWAY, q_two, mask=q_inside)
    tl.store(k_to, k_one, mask=k_inside)
    tl.store(k_to + AWAY, k_two, mask=k_inside)
    tl.store(out + (H + G) * K + j, values, mask=j < V)
    q_one, q_two, k_one, k_two = q_one.to(tl.float32), q_two.to(tl.float32), k_one.to(tl.float32), k_two.to(tl.float32)
    values = values.to(tl.float32)
    sizes = tl.maximum(tl.max(size_bits(q_one)), tl.max(size_bits(q_two)))
    sizes = tl.maximum(sizes, tl.maximum(tl.max(size_bits(k_one)), tl.max(size_bits(k_two))))
    scale, inverse = _scale(tl.maximum(sizes, tl.max(size_bits(values))))
    tl.store(scales + token, scale)
    q_to, _ = half_heads(codes, H, K, HALF, STEP, BLOCK_H, BLOCK_HALF)
    k_to, _ = half_heads(codes + H * K, G, K, HALF, STEP, BLOCK_G, BLOCK_HALF)
    tl.store(q_to, code_bits(q_one, inverse).to(tl.int8), mask=q_inside)
    tl.store(q_to + AWAY, code_bits(q_two, inverse).to(tl.int8), mask=q_inside)
    tl.store(k_to, code_bits(k_one, inverse).to(tl.int8), mask=k_inside)
    tl.store(k_to + AWAY, code_bits(k_two, inverse).to(tl.int8), mask=k_inside)
    tl.store(codes + (H + G) * K + j, code_bits(values, inverse).to(tl.int8), mask=j < V)


def join_rotated_codes(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, cos_TK: Tensor, sin_TK: Tensor, inverse: bool, pairs: bool
) -> tuple[Tensor, Int8Rows]:
    num_tokens = q_THK.shape[0]
    width, options = join_options(q_THK, k_TGK, v_TGK, inverse, pairs)
    if width > WIDEST_HEADS:
        out = join_rotated(q_THK, k_TGK, v_TGK, cos_TK, sin_TK, inverse, pairs)
        return out, quantize_rows(out, is_rotated=False)
    out = q_THK.new_empty(num_tokens, width)
    codes = torch.empty((num_tokens, width), dtype=torch.int8, device=out.device)
    scale_T = torch.empty(num_tokens, dtype=torch.float32, device=out.device)
    if num_tokens:
        strides = (x.stride(0) for x in (q_THK, k_TGK, v_TGK, cos_TK, sin_TK))
        _heads_kernel[(num_tokens,)](q_THK, k_TGK, v_TGK, out, cos_TK, sin_TK, codes, scale_T, *strides, **options)
    return out, Int8Rows(codes, scale_T)
