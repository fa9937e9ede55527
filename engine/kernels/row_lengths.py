"""Add up over the rows of a weight in Triton, packed NF4 or plain: lengths of W + scaling * B A, and sums of W times P.

DoRA (arXiv:2402.09353) needs the lengths for each adapted layer after each step, and the sums for the
gradient of its magnitudes. With torch the lengths took 15 launches a layer and 164 ms a step of an 8B
model on a slow host (H100). Here neither W nor a product with it is ever written. A program walks over
its rows tile by tile: it dequantises, and adds up in fp32.

Shape letters: O output features, D input features, R rank.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.nf4_state import Nf4State

ROWS, COLUMNS = 16, 256  # a tile of W
MOST_RANKS = {2: 64, 4: 16}  # of B A at once, by bytes of an element: fp32 tiles of 64 do not fit a small card's 99 KB
NUM_WARPS = 4


@triton.jit
def _scales(
    absmax, nested_code, nested_absmax, nested_offset, block, exists, NESTED_BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr
):  # fmt: skip
    """Return the absmax of each block [...]."""
    scale = tl.load(absmax + block, mask=exists, other=0)
    if NESTED:
        nested_scale = tl.load(nested_absmax + block // NESTED_BLOCK_SIZE, mask=exists, other=0.0)
        scale = tl.load(nested_code + scale.to(tl.int32)) * nested_scale + tl.load(nested_offset)
    return scale


@triton.jit
def _tile(
    weight, code, absmax, nested_code, nested_absmax, nested_offset, row, start, exists, width,
    BLOCK_SIZE: tl.constexpr, NESTED_BLOCK_SIZE: tl.constexpr, PACKED: tl.constexpr, NESTED: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return W of these rows and COLUMNS columns from `start` on, in fp32; anything outside of it."""
    column = start + tl.arange(0, COLUMNS)
    inside = exists[:, None] & (column < width)[None, :]
    element = row[:, None] * width + column[None, :]
    if PACKED:
        if WHOLE:
            half = start // 2 + tl.arange(0, COLUMNS // 2)
            has_byte = exists[:, None] & (half < width // 2)[None, :]
            pairs = tl.load(weight + row[:, None] * (width // 2) + half[None, :], mask=has_byte, other=0).to(tl.int32)
            nibbles = (pairs[:, :, None] >> ((1 - tl.arange(0, 2)) * 4)[None, None, :]) & 15  # the high nibble comes first
            place = start // BLOCK_SIZE + tl.arange(0, COLUMNS // BLOCK_SIZE)
            block = row[:, None] * (width // BLOCK_SIZE) + place[None, :]
            has_block = exists[:, None] & (place < width // BLOCK_SIZE)[None, :]
            scale = _scales(absmax, nested_code, nested_absmax, nested_offset, block, has_block, NESTED_BLOCK_SIZE, NESTED)
            scale = tl.broadcast_to(scale[:, :, None], [ROWS, COLUMNS // BLOCK_SIZE, BLOCK_SIZE]).reshape(ROWS, COLUMNS)
        else:
            shift = ((1 - element % 2) * 4).to(tl.int32)
            nibbles = (tl.load(weight + element // 2, mask=inside, other=0).to(tl.int32) >> shift) & 15
            block = element // BLOCK_SIZE
            scale = _scales(absmax, nested_code, nested_absmax, nested_offset, block, inside, NESTED_BLOCK_SIZE, NESTED)
        table = tl.load(code + tl.arange(0, 16))
        w = tl.gather(table, nibbles.reshape(ROWS * COLUMNS), 0).reshape(ROWS, COLUMNS) * scale
    else:
        w = tl.load(weight + element, mask=inside, other=0.0).to(tl.float32)
    return w


@triton.jit
def _row_lengths_kernel(
    weight, code, absmax, nested_code, nested_absmax, nested_offset, a, b, out, scaling, num_rows, width, rank,
    BLOCK_SIZE: tl.constexpr, NESTED_BLOCK_SIZE: tl.constexpr, PACKED: tl.constexpr, NESTED: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Write the lengths of ROWS rows. WHOLE: blocks of the packed weight begin where rows and tiles do."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < num_rows
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, COLUMNS):
        w = _tile(
            weight, code, absmax, nested_code, nested_absmax, nested_offset, row, start, exists, width,
            BLOCK_SIZE, NESTED_BLOCK_SIZE, PACKED, NESTED, WHOLE, ROWS, COLUMNS,
        )  # fmt: skip
        column = start + tl.arange(0, COLUMNS)
        in_width = (column < width)[None, :]
        ba = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, rank, RANKS):
            r = first + tl.arange(0, RANKS)
            in_rank = r < rank
            b_tile = tl.load(b + row[:, None] * rank + r[None, :], mask=exists[:, None] & in_rank[None, :], other=0.0)
            a_place = r.to(tl.int64)[:, None] * width + column[None, :]
            a_tile = tl.load(a + a_place, mask=in_rank[:, None] & in_width, other=0.0)
            ba = tl.dot((b_tile * scaling).to(a_tile.dtype), a_tile, ba, input_precision="ieee")
        total = tl.where(exists[:, None] & in_width, w + ba, 0.0)
        squares += tl.sum(total * total, axis=1)
    tl.store(out + row, tl.sqrt_rn(squares), mask=exists)


@triton.jit
def _row_dots_kernel(
    weight, code, absmax, nested_code, nested_absmax, nested_offset, p, out, num_rows, width, first,
    BLOCK_SIZE: tl.constexpr, NESTED_BLOCK_SIZE: tl.constexpr, PACKED: tl.constexpr, NESTED: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the sums of W times P over ROWS rows. Row 0 of P belongs to row `first` of W."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < num_rows
    dots = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, COLUMNS):
        w = _tile(
            weight, code, absmax, nested_code, nested_absmax, nested_offset, row + first, start, exists, width,
            BLOCK_SIZE, NESTED_BLOCK_SIZE, PACKED, NESTED, WHOLE, ROWS, COLUMNS,
        )  # fmt: skip
        column = start + tl.arange(0, COLUMNS)
        inside = exists[:, None] & (column < width)[None, :]
        p_tile = tl.load(p + row[:, None] * width + column[None, :], mask=inside, other=0.0)
        dots += tl.sum(tl.where(inside, w * p_tile, 0.0), axis=1)
    tl.store(out + row, dots, mask=exists)


def row_lengths_(weight: Nf4State | Tensor, a_RD: Tensor, b_OR: Tensor, scaling: float, out_O: Tensor) -> None:
    """Write the lengths of the rows of W + scaling * B A into `out_O`; see `ops.row_lengths`."""
    (num_rows, rank), width = b_OR.shape, a_RD.shape[1]
    ranks = min(MOST_RANKS[a_RD.element_size()], max(16, triton.next_power_of_2(rank)))
    tensors, sizes = _launch(weight, width)
    sizes["RANKS"] = ranks
    _row_lengths_kernel[(triton.cdiv(num_rows, ROWS),)](*tensors, a_RD, b_OR, out_O, scaling, num_rows, width, rank, **sizes)


def row_dots_(weight: Nf4State | Tensor, p_OD: Tensor, first: int, out_O: Tensor) -> None:
    """Write the sums of W times P over the rows that P has into `out_O`; see `ops.row_dots`."""
    num_rows, width = p_OD.shape
    tensors, sizes = _launch(weight, width)
    _row_dots_kernel[(triton.cdiv(num_rows, ROWS),)](*tensors, p_OD, out_O, num_rows, width, first, **sizes)


def _launch(weight: Nf4State | Tensor, width: int) -> tuple[list[Tensor | None], dict[str, int]]:
    """Return the weight's tensors, and what the kernels are compiled for."""
    sizes = {"ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": NUM_WARPS}
    if isinstance(weight, Tensor):
        plain = {"BLOCK_SIZE": 1, "NESTED_BLOCK_SIZE": 1, "PACKED": False, "NESTED": False, "WHOLE": False}
        return [weight, None, None, None, None, None], plain | sizes
    nested = [weight.nested_code, weight.nested_absmax_S, weight.nested_offset]
    block, is_nested = weight.block_size, weight.nested_code is not None
    packed = {"BLOCK_SIZE": block, "NESTED_BLOCK_SIZE": weight.nested_block_size, "PACKED": True, "NESTED": is_nested}
    packed["WHOLE"] = width % block == 0 and COLUMNS % block == 0
    return [weight.packed, weight.code, weight.absmax_M, *nested], packed | sizes
