"""Compute gpt-oss's gate in Triton: h = (clamp(u) + 1) * g * sigmoid(alpha * g), with g clamped from above.

Gate and up take turns in a row, so a program loads both together and splits them in registers.

Shape letters: S rows, F expert hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH, WARPS = 1024, 4


@triton.jit
def _halves(gate_up, row, pair, WIDTH: tl.constexpr, width):
    """Return gate and up [WIDTH] in fp32."""
    both = tl.arange(0, 2 * WIDTH)
    start = gate_up + row * 2 * width + 2 * pair
    values = tl.load(start + both, mask=2 * pair + both < 2 * width, other=0.0).to(tl.float32)
    return tl.split(values.reshape(WIDTH, 2))


@triton.jit
def _gate_kernel(gate_up, out, limit, alpha, width, WIDTH: tl.constexpr):
    row, pair = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH
    f = pair + tl.arange(0, WIDTH)
    gate, up = _halves(gate_up, row, pair, WIDTH, width)
    gate, up = tl.minimum(gate, limit), tl.minimum(tl.maximum(up, -limit), limit)
    tl.store(out + row * width + f, ((up + 1.0) * gate * tl.sigmoid(alpha * gate)).to(out.dtype.element_ty), mask=f < width)


@triton.jit
def _gradient_kernel(gate_up, dh, limit, alpha, width, WIDTH: tl.constexpr):
    """Put the gradients of gate and up in their place."""
    row, pair = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH
    f = pair + tl.arange(0, WIDTH)
    raw_gate, raw_up = _halves(gate_up, row, pair, WIDTH, width)
    d = tl.load(dh + row * width + f, mask=f < width, other=0.0).to(tl.float32)
    gate, up = tl.minimum(raw_gate, limit), tl.minimum(tl.maximum(raw_up, -limit), limit)
    share = tl.sigmoid(alpha * gate)
    dgate = tl.where(raw_gate <= limit, d * (up + 1.0) * share * (1.0 + alpha * gate * (1.0 - share)), 0.0)
    dup = tl.where((raw_up >= -limit) & (raw_up <= limit), d * gate * share, 0.0)
    both = tl.arange(0, 2 * WIDTH)
    target = gate_up + row * 2 * width + 2 * pair + both
    tl.store(target, tl.join(dgate, dup).reshape(2 * WIDTH).to(gate_up.dtype.element_ty), mask=2 * pair + both < 2 * width)


def clamped_gate(gate_up_SG: Tensor, limit: float, alpha: float) -> Tensor:
    """Return h [S, F] for contiguous rows of gate and up in turns [S, 2 F]."""
    rows, width = gate_up_SG.shape[0], gate_up_SG.shape[1] // 2
    out_SF = torch.empty(rows, width, dtype=gate_up_SG.dtype, device=gate_up_SG.device)
    _gate_kernel[(rows, triton.cdiv(width, WIDTH))](gate_up_SG, out_SF, limit, alpha, width, WIDTH=WIDTH, num_warps=WARPS)
    return out_SF


def clamped_gate_backward_(gate_up_SG: Tensor, dh_SF: Tensor, limit: float, alpha: float) -> None:
    """Overwrite gate and up by their gradients."""
    rows, width = dh_SF.shape
    grid = rows, triton.cdiv(width, WIDTH)
    _gradient_kernel[grid](gate_up_SG, dh_SF.contiguous(), limit, alpha, width, WIDTH=WIDTH, num_warps=WARPS)
