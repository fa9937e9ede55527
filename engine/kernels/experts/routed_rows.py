"""Weigh the gradients of experts' rows by the routing in Triton, and find the gradient of the routing weights on the way.

Shape letters: T tokens, K experts a token, S = T * K rows sorted by expert, F features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH, WARPS = 1024, 4


@triton.jit
def _weigh_kernel(dy, y, order, weights, dots, width, WIDTH: tl.constexpr):
    """Multiply one row of dy by its weight in place, after its product with y."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(order + row)
    weight = tl.load(weights + place).to(dy.dtype.element_ty).to(tl.float32)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for first in range(0, width, WIDTH):
        f = first + tl.arange(0, WIDTH)
        gradient = tl.load(dy + row * width + f, mask=f < width, other=0.0).to(tl.float32)
        total += gradient * tl.load(y + row * width + f, mask=f < width, other=0.0).to(tl.float32)
        tl.store(dy + row * width + f, (gradient * weight).to(dy.dtype.element_ty), mask=f < width)
    tl.store(dots + place, tl.sum(total, 0))


def weigh_rows_(dy_SF: Tensor, y_SF: Tensor, order_S: Tensor, weights_TK: Tensor) -> Tensor:
    """Return dy . y of each choice [T, K] in fp32, and multiply the rows of dy, contiguous, by their weights in place."""
    rows, width = dy_SF.shape
    dots_TK = torch.empty(weights_TK.shape, dtype=torch.float32, device=dy_SF.device)
    operands = dy_SF, y_SF.contiguous(), order_S, weights_TK.contiguous(), dots_TK
    _weigh_kernel[(rows,)](*operands, width, WIDTH=WIDTH, num_warps=WARPS)
    return dots_TK
