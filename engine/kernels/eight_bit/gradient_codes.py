"""Compute the gradient of a gated linear unit and its int8 codes in one pass, in Triton.

The product of the input gradient reads dgate | dup in codes, with one scale for each token. A
program holds a whole token in registers, so it knows the scale before it writes. That saves reading
the gradient again. A token that registers do not hold takes two kernels, and gives the same.

Shape letters: T tokens, F MLP hidden.
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

WIDEST = 16_384  # F of a token that registers hold: 16 elements of each of three tensors a thread


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
