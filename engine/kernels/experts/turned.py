"""Turn the B of adapters on experts in Triton, from PEFT's layout to that of the products and back, tile by tile.

Shape letters: E experts, O output features, R rank, J = O * R.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, WARPS = 64, 4


@triton.jit
def _turn_kernel(
    x, out, factor, rows, columns, x_batch, x_row, out_batch, out_column, IS_TENSOR: tl.constexpr, TILE: tl.constexpr
):
    """Write one tile of factor * x^T of a batch of matrices. Rows of x, and columns of the result, are contiguous."""
    i, k = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1) * TILE + tl.arange(0, TILE)
    batch = tl.program_id(2).to(tl.int64)
    scale = tl.load(factor) if IS_TENSOR else factor
    inside = (i < rows)[:, None] & (k < columns)[None, :]
    values = tl.load(x + batch * x_batch + i.to(tl.int64)[:, None] * x_row + k[None, :], mask=inside, other=0.0)
    turned = tl.trans((values.to(tl.float32) * scale).to(out.dtype.element_ty))
    tl.store(out + batch * out_batch + k.to(tl.int64)[:, None] * out_column + i[None, :], turned, mask=tl.trans(inside))


def by_expert(b_JE: Tensor, factor: Tensor | float, rank: int, dtype: torch.dtype) -> Tensor:
    """Return factor * B [E, O, R] in `dtype`, of a contiguous B [O * R, E]."""
    rows, experts = b_JE.shape
    out_EOR = torch.empty(experts, rows // rank, rank, dtype=dtype, device=b_JE.device)
    _turn(b_JE, out_EOR, factor, rows, experts, (0, experts), (0, rows), 1)
    return out_EOR


def as_stored(db_EOR: Tensor, factor: Tensor | float) -> Tensor:
    """Return factor * dB [O * R, E] in fp32, of dB [E, O, R] in any layout."""
    experts, features, rank = db_EOR.shape
    out_JE = torch.empty(features * rank, experts, dtype=torch.float32, device=db_EOR.device)
    db_ERO = db_EOR.transpose(1, 2).contiguous()  # as the outer sums leave it
    _turn(db_ERO, out_JE, factor, experts, features, (features, rank * features), (experts, rank * experts), rank)
    return out_JE


def _turn(
    x: Tensor, out: Tensor, factor: Tensor | float, rows: int, columns: int, x_strides: tuple[int, int],
    out_strides: tuple[int, int], batch: int,
) -> None:  # fmt: skip
    """strides: of the batch and of the side that is not contiguous."""
    grid = triton.cdiv(rows, TILE), triton.cdiv(columns, TILE), batch
    is_tensor = isinstance(factor, Tensor)
    _turn_kernel[grid](x, out, factor, rows, columns, *x_strides, *out_strides, IS_TENSOR=is_tensor, TILE=TILE, num_warps=WARPS)
