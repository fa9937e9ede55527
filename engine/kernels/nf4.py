"""Dequantise NF4 in Triton: packed bytes and block scales in, a 16-bit weight out, in one launch.

The same launch undoes double quantisation, so no fp32 absmax of the whole weight is ever written.
The result is bit-equal to bitsandbytes. It computes absmax = code[q] * scale + offset with a
rounding after each operation, hence no fused multiply-add. Then it computes code[nibble] * absmax
in fp32 and rounds once to the output's dtype.

If size and alignment allow, the kernel loads four packed bytes at a time, so one thread stores
eight elements (16 bytes of bf16). The kernel keeps the 16-entry code table on chip and looks it up
with `tl.gather`: 16 words have no bank conflicts.

Shape letters: M blocks of elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.nf4_state import Nf4State

TILE = 1024  # elements per program. H100: 57 us; 130 us from 2,048 on, at any number of warps
NUM_WARPS = 2
WORD_BYTES = 4


@triton.jit
def _dequantize_kernel(
    packed, code, absmax, nested_code, nested_absmax, nested_offset, factors, out, numel, num_blocks, num_units, row_blocks,
    BLOCK_SIZE: tl.constexpr, NESTED_BLOCK_SIZE: tl.constexpr, UNIT_BYTES: tl.constexpr, BLOCKS: tl.constexpr,
    NESTED: tl.constexpr, FACTORS: tl.constexpr,
):  # fmt: skip
    """Dequantise one tile [BLOCKS, UNITS, NIBBLES].

    It has BLOCKS blocks of UNITS loaded units (words or bytes), and each unit holds NIBBLES
    elements.
    """
    NIBBLES: tl.constexpr = 2 * UNIT_BYTES
    UNITS: tl.constexpr = BLOCK_SIZE // NIBBLES
    first_block = tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)  # from here on, offsets are 32-bit and their starts 64-bit
    unit = block[:, None] * UNITS + tl.arange(0, UNITS)[None, :]
    words = tl.load(packed + first_block * UNITS + unit, mask=unit < num_units - first_block * UNITS, other=0).to(tl.int32)

    exists = block < num_blocks - first_block
    scale = tl.load(absmax + first_block + block, mask=exists, other=0)
    if NESTED:
        nested_scale = tl.load(nested_absmax + (first_block + block) // NESTED_BLOCK_SIZE, mask=exists, other=0.0)
        scale = tl.load(nested_code + scale.to(tl.int32)) * nested_scale
        scale = scale + tl.load(nested_offset)
    if FACTORS:
        scale = scale * tl.load(factors + (first_block + block) // row_blocks, mask=exists, other=0.0)

    i = tl.arange(0, NIBBLES)
    # Little-endian word, high nibble first: element i of a word starts at bit 4, 0, 12, 8, ...
    nibbles = (words[:, :, None] >> ((i ^ 1) * 4)[None, None, :]) & 15
    table = tl.load(code + tl.arange(0, 16))
    values = tl.gather(table, nibbles.reshape(BLOCKS * BLOCK_SIZE), 0).reshape(BLOCKS, UNITS, NIBBLES) * scale[:, None, None]
    element = unit[:, :, None] * NIBBLES + i[None, None, :]
    inside = element < numel - first_block * BLOCK_SIZE
    tl.store(out + first_block * BLOCK_SIZE + element, values.to(out.dtype.element_ty), mask=inside)


def dequantize_nf4_(state: Nf4State, out: Tensor, factors_O: Tensor | None = None) -> None:
    """Dequantise into `out`, which is contiguous, of the state's shape and any float dtype; rows times their factors."""
    in_kernel = factors_O is None or state.shape[1] % state.block_size == 0  # else blocks lie across rows
    launch_dequantize(state, out, TILE, NUM_WARPS, factors_O if in_kernel else None)
    if not in_kernel:
        out.mul_(factors_O[:, None])


def launch_dequantize(state: Nf4State, out: Tensor, tile: int, num_warps: int, factors_O: Tensor | None = None) -> None:
    """Dequantise with the caller's choice of tile and warps (the benchmark's --tune).

    factors_O: of rows, which must be whole blocks.
    """
    numel, packed = out.numel(), state.packed
    unit_bytes = 1
    if packed.numel() % WORD_BYTES == 0 and packed.data_ptr() % WORD_BYTES == 0 and packed.storage_offset() % WORD_BYTES == 0:
        packed, unit_bytes = packed.view(torch.int32), WORD_BYTES
    blocks_per_tile = max(1, tile // state.block_size)
    num_blocks = triton.cdiv(numel, state.block_size)
    _dequantize_kernel[(triton.cdiv(num_blocks, blocks_per_tile),)](
        packed, state.code, state.absmax_M, state.nested_code, state.nested_absmax_S, state.nested_offset, factors_O,
        out, numel, num_blocks, packed.numel(), max(1, state.shape[-1] // state.block_size),
        BLOCK_SIZE=state.block_size, NESTED_BLOCK_SIZE=state.nested_block_size, UNIT_BYTES=unit_bytes, BLOCKS=blocks_per_tile,
        NESTED=state.nested_code is not None, FACTORS=factors_O is not None, num_warps=num_warps, enable_fp_fusion=False,
    )  # fmt: skip
