"""Compute RMSNorm in Triton.

One program holds one row in registers, so each tensor crosses memory once.

Shape letters: T tokens, D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward_kernel(
    x, delta, weight, total, y, rstd, x_stride, delta_stride, eps, offset, scale, D,
    BLOCK_D: tl.constexpr, ADD: tl.constexpr, ROUND_FIRST: tl.constexpr,
):  # fmt: skip
    """Write total = x + scale * delta if ADD, rstd, and y = total * rstd * (offset + weight).

    With ROUND_FIRST, total * rstd is rounded before it is multiplied by the weight.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        v += scale * tl.load(delta + row * delta_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = v.to(total.dtype.element_ty)
        tl.store(total + row * D + columns, rounded, mask=inside)
        v = rounded.to(tl.float32)  # the norm sees the rounded sum, as later layers do
    r = tl.rsqrt(tl.sum(v * v, axis=0) / D + eps)
    tl.store(rstd + row, r)
    n = v * r
    if ROUND_FIRST:
        n = n.to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * D + columns, (n * (offset + w)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dy, x, weight, rstd, residual, dx, dy_stride, x_stride, residual_stride, offset, D,
    BLOCK_D: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Write dx = rstd * (g - n * mean(g * n)), plus residual if ADD.

    Here n = x * rstd and g = dy * (offset + weight).
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32) * (offset + w)
    r = tl.load(rstd + row)
    n = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32) * r
    v = r * (g - n * (tl.sum(g * n, axis=0) / D))
    if ADD:
        v += tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row * D + columns, v.to(dx.dtype.element_ty), mask=inside)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0, round_once: bool = False) -> tuple[Tensor, Tensor]:
    _, y_TD, rstd_T = _forward(x_TD, None, weight_D, eps, offset, round_once)
    return y_TD, rstd_T


def add_rms_norm(
    x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0, round_once: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _forward(x_TD, delta_TD, weight_D, eps, offset, round_once, scale)


def rms_norm_backward(
    dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, offset: float = 0.0, residual_TD: Tensor | None = None
) -> Tensor:
    num_tokens, width = x_TD.shape
    dx_TD = torch.empty((num_tokens, width), dtype=x_TD.dtype, device=x_TD.device)
    if num_tokens:
        block, warps = _launch(width)
        add = residual_TD is not None
        _backward_kernel[(num_tokens,)](
            dy_TD, x_TD, weight_D, rstd_T, residual_TD, dx_TD,
            dy_TD.stride(0), x_TD.stride(0), residual_TD.stride(0) if add else 0, float(offset), width,
            BLOCK_D=block, ADD=add, num_warps=warps,
        )  # fmt: skip
    return dx_TD


def _forward(
    x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float, offset: float, round_once: bool,
    scale: float = 1.0,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    num_tokens, width = x_TD.shape
    y_TD = torch.empty((num_tokens, width), dtype=x_TD.dtype, device=x_TD.device)
    rstd_T = torch.empty((num_tokens,), dtype=torch.float32, device=x_TD.device)
    add = delta_TD is not None
    total_TD = torch.empty((num_tokens, width), dtype=x_TD.dtype, device=x_TD.device) if add else None
    if num_tokens:
        block, warps = _launch(width)
        _forward_kernel[(num_tokens,)](
            x_TD, delta_TD, weight_D, total_TD, y_TD, rstd_T,
            x_TD.stride(0), delta_TD.stride(0) if add else 0, float(eps), float(offset), float(scale), width,
            BLOCK_D=block, ADD=add, ROUND_FIRST=offset == 0.0 and not round_once, num_warps=warps,
        )  # fmt: skip
    return total_TD, y_TD, rstd_T


def _launch(width: int) -> tuple[int, int]:
    """Return block and warps for one row.

    Up to a width of 8,192 each thread has 16 elements: two 16-byte loads of bf16.
    """
    block = triton.next_power_of_2(width)
    return block, min(16, max(2, block // 512))
