"""Multiply rows sorted by expert with torch's grouped product, after the experts are dequantised.

It is faster than the kernels that dequantise in each tile where the card has a fast grouped product and
experts have many rows, for the memory of one weight of all experts in 16 bits. H100, 16,384 rows of 128
experts of 1536 x 2048: 785 us for 1,143; 8,192 rows of 32 experts of 5760 x 2880: 1,109 for 2,256.

Shape letters: S rows, E experts, O output features, D input features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels import ops
from engine.kernels.eight_bit.card_facts import capability
from engine.kernels.nf4_state import Nf4State
from engine.shape.experts_shape import MIN_ROWS

HOPPER = 90
ALIGNED = 8  # 16-bit values in the 16 bytes that the product's rows are multiples of
# torch 2.9 has it under this name alone
_grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm


def takes(x: Tensor, state: Nf4State, room: int, num_choices: int = 1) -> bool:
    """Return True if this path is faster for these rows and has room.

    room: bytes for dequantised experts. num_choices: rows that each row of x becomes.
    """
    experts, height, width = state.shape
    if x.dtype != torch.bfloat16 or capability(x) != HOPPER or height % ALIGNED or width % ALIGNED:
        return False
    return num_choices * x.shape[0] >= MIN_ROWS * experts and room >= dense_bytes(state.shape)


def dense_bytes(shape: tuple[int, ...]) -> int:
    """Return the bytes of one weight of all experts in 16 bits, and of zeros for rows of no expert."""
    experts, *features = shape
    return 2 * (experts + 1) * math.prod(features)


def linear(x_SD: Tensor, state: Nf4State, ends_E: Tensor, dense: Tensor | None = None) -> Tensor:
    """Return x W_e^T [S, O]. dense: the dequantised experts, if they are there already."""
    dense = dequantized(state, x_SD.dtype) if dense is None else dense
    return _product(x_SD, dense.transpose(1, 2), ends_E)


def input_gradient(dy_SO: Tensor, state: Nf4State, ends_E: Tensor, dense: Tensor | None = None) -> Tensor:
    """Return dy W_e [S, D]. dense: as for `linear`."""
    return _product(dy_SO, dequantized(state, dy_SO.dtype) if dense is None else dense, ends_E)


def dequantized(state: Nf4State, dtype: torch.dtype) -> Tensor:
    """Return [E + 1, O, D]: the experts, then zeros for the rows of no expert."""
    experts, height, width = state.shape
    weights = torch.empty(experts + 1, height, width, dtype=dtype, device=state.packed.device)
    ops.dequantize_nf4(state, dtype, weights[:experts])
    weights[experts].zero_()
    return weights


def _product(rows: Tensor, weights: Tensor, ends_E: Tensor) -> Tensor:
    return _grouped_mm(rows.contiguous(), weights, offs=F.pad(ends_E.to(torch.int32), (0, 1), value=rows.shape[0]))
