"""Gated linear unit in Triton: h = act(gate) * up, and a backward pass that overwrites its inputs.

The backward pass leaves h where dh was, so the forward pass need not save h for the gradient of the next matmul's adapter.

Shape letters: T tokens, F MLP hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_F = 2048  # divides 8,192 and 14,336; two 16-byte loads of bf16 a thread and tensor
NUM_WARPS = 4


@triton.jit
def _activate(g, GELU: tl.constexpr):
    """act(g) and act'(g). Both are g * sigmoid(s): silu has s = g, gelu_tanh s = 2 sqrt(2 / pi) (g + 0.044715 g^3)."""
    if GELU:
        s = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        ds = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
        p = 1.0 / (1.0 + tl.exp(-s))
        return g * p, p + g * p * (1.0 - p) * ds
    else:
        p = 1.0 / (1.0 + tl.exp(-g))
        return g * p, p + g * p * (1.0 - p)


@triton.jit
def _place(F, BLOCK_F: tl.constexpr):
    """Row, columns and which columns exist of this program. One grid axis, because the others end at 65,535."""
    blocks_per_row = tl.cdiv(F, BLOCK_F)
    row = tl.program_id(0) // blocks_per_row
    columns = (tl.program_id(0) % blocks_per_row) * BLOCK_F + tl.arange(0, BLOCK_F)
    return row.to(tl.int64), columns, columns < F


@triton.jit
def _forward_kernel(gate, up, h, gate_stride, up_stride, F, GELU: tl.constexpr, BLOCK_F: tl.constexpr):
    row, columns, inside = _place(F, BLOCK_F)
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    act, _ = _activate(g, GELU)
    tl.store(h + row * F + columns, (act * u).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(dh, gate, up, dh_stride, gate_stride, up_stride, F, GELU: tl.constexpr, BLOCK_F: tl.constexpr):
    """gate <- dh * up * act'(gate), up <- dh * act(gate), dh <- act(gate) * up."""
    row, columns, inside = _place(F, BLOCK_F)
    dh += row * dh_stride
    gate += row * gate_stride
    up += row * up_stride
    d = tl.load(dh + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + columns, mask=inside, other=0.0).to(tl.float32)
    act, slope = _activate(g, GELU)
    tl.store(dh + columns, (act * u).to(dh.dtype.element_ty), mask=inside)
    tl.store(gate + columns, (d * u * slope).to(gate.dtype.element_ty), mask=inside)
    tl.store(up + columns, (d * act).to(up.dtype.element_ty), mask=inside)


def glu(gate_TF: Tensor, up_TF: Tensor, activation: str) -> Tensor:
    num_tokens, width = gate_TF.shape
    h_TF = torch.empty((num_tokens, width), dtype=gate_TF.dtype, device=gate_TF.device)
    if h_TF.numel():
        block, warps = _launch(width)
        _forward_kernel[(num_tokens * triton.cdiv(width, block),)](
            gate_TF, up_TF, h_TF, gate_TF.stride(0), up_TF.stride(0), width,
            GELU=activation == "gelu_tanh", BLOCK_F=block, num_warps=warps,
        )  # fmt: skip
    return h_TF


def glu_backward_(dh_TF: Tensor, gate_TF: Tensor, up_TF: Tensor, activation: str) -> None:
    num_tokens, width = gate_TF.shape
    if not gate_TF.numel():
        return
    block, warps = _launch(width)
    _backward_kernel[(num_tokens * triton.cdiv(width, block),)](
        dh_TF, gate_TF, up_TF, dh_TF.stride(0), gate_TF.stride(0), up_TF.stride(0), width,
        GELU=activation == "gelu_tanh", BLOCK_F=block, num_warps=warps,
    )  # fmt: skip


def _launch(width: int) -> tuple[int, int]:
    """Block and warps: 16 elements a thread, no block wider than the row needs."""
    block = min(BLOCK_F, triton.next_power_of_2(width))
    return block, max(1, NUM_WARPS * block // BLOCK_F)
