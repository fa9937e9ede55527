"""Gather rows of an embedding table in Triton, from the device or from pinned host memory.

The GPU reads pinned host memory over PCIe without a copy of the table. A step of 4,096 tokens reads
at most 34 MB of a table of 128,256 rows (1 GB at D = 4,096 in bf16).

Shape letters: T tokens, V rows of the table, D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK_D = 2048
NUM_WARPS = 4  # two 16-byte loads of bf16 per thread at MAX_BLOCK_D


@triton.jit
def _gather_kernel(table, ids, out, table_stride, V, D, BLOCK_D: tl.constexpr):
    """Copy one block of columns of one row. An id outside [0, V) reads nothing and gives zeros."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(ids + token)
    exists = (row >= 0) & (row < V)
    values = tl.load(table + row * table_stride + columns, mask=(columns < D) & exists, other=0.0)
    tl.store(out + token * D + columns, values, mask=columns < D)


def gather_rows(table_VD: Tensor, ids_T: Tensor) -> Tensor:
    num_rows, width = table_VD.shape
    out_TD = torch.empty((ids_T.shape[0], width), dtype=table_VD.dtype, device=ids_T.device)
    if out_TD.numel():
        block = min(MAX_BLOCK_D, triton.next_power_of_2(width))
        _gather_kernel[(ids_T.shape[0], triton.cdiv(width, block))](
            table_VD, ids_T, out_TD, table_VD.stride(0), num_rows, width, BLOCK_D=block, num_warps=NUM_WARPS
        )
    return out_TD
