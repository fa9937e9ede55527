"""Unpack NF4 to int8 codes of the rotated W in Triton, for weights whose groups of 64 have one block scale.

A group is 64 neighbours of a row, and lies in one block if blocks hold a multiple of 64. Its scale
then comes after the rotation: only the 16 values of NF4's table enter the product on tensor cores,
as fp16 (an error of 2^-12), with the Hadamard matrix, which fp16 holds exactly.

Groups follow each other in memory, so a weight is one list of groups. A program takes many tiles of
BLOCK_G groups, because it makes the Hadamard matrix once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.eight_bit.card_facts import multiprocessors
from engine.kernels.eight_bit.int8_reference import GROUP
from engine.kernels.eight_bit.unpacking_parts import code_bits, hadamard_tile, nibbles_of
from engine.kernels.nf4_state import Nf4State

WORD_BYTES = 4


@dataclass(frozen=True)
class GroupTile:
    """Hold one way to launch: groups a tile, warps, programs on one multiprocessor, stages of loads."""

    groups: int
    warps: int
    per_processor: int
    stages: int


CODES = LIMITS = GroupTile(64, 4, 5, 2)


@triton.jit
def _rotated_tile(
    packed, code, absmax, nested_code, nested_absmax, nested_offset, first, num_groups, h,
    PER_BLOCK: tl.constexpr, NESTED_BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Return the rotated table values of BLOCK_G groups, [BLOCK_G, 64] in fp32, and the groups' block scales."""
    g = tl.arange(0, BLOCK_G)
    exists = g < num_groups - first
    place = g[:, None] * 8 + tl.arange(0, 8)[None, :]
    words = tl.load(packed + first * 8 + place, mask=exists[:, None], other=0)
    table = tl.load(code + tl.arange(0, 16)).to(tl.float16)
    values = tl.gather(table, nibbles_of(words, BLOCK_G * 64), 0).reshape(BLOCK_G, 64)
    block = (first + g) // PER_BLOCK
    scale = tl.load(absmax + block, mask=exists, other=0)
    if NESTED:
        nested_scale = tl.load(nested_absmax + block // NESTED_BLOCK_SIZE, mask=exists, other=0.0)
        scale = tl.load(nested_code + scale.to(tl.int32)) * nested_scale
        scale = scale + tl.load(nested_offset)
    return tl.dot(values, h), scale


@triton.jit
def _codes_kernel(
    packed, code, absmax, nested_code, nested_absmax, nested_offset, scales, codes, num_groups, per_row,
    PER_BLOCK: tl.constexpr, NESTED_BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Write the codes of every group, with scales of rows, each of per_row groups."""
    h = hadamard_tile(tl.float16)
    for tile in range(tl.program_id(0), tl.cdiv(num_groups, BLOCK_G), tl.num_programs(0)):
        first = tl.full((), tile, tl.int64) * BLOCK_G
        values, scale = _rotated_tile(
            packed, code, absmax, nested_code, nested_absmax, nested_offset, first, num_groups, h,
            PER_BLOCK, NESTED_BLOCK_SIZE, NESTED, BLOCK_G,
        )  # fmt: skip
        g = tl.arange(0, BLOCK_G)
        exists = g < num_groups - first
        inverse = tl.div_rn(1.0, tl.load(scales + (tile * BLOCK_G + g) // per_row, mask=exists, other=1.0))
        kept = code_bits(values, (scale * inverse)[:, None]).to(tl.int8)
        tl.store(codes + first * 64 + (g[:, None] * 64 + tl.arange(0, 64)[None, :]), kept, mask=exists[:, None])


@triton.jit
def _limits_kernel(
    packed, code, absmax, nested_code, nested_absmax, nested_offset, limits, num_groups, per_row,
    PER_BLOCK: tl.constexpr, NESTED_BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Raise the limits of rows, as bits of floats, to their groups' largest rotated |w|."""
    h = hadamard_tile(tl.float16)
    for tile in range(tl.program_id(0), tl.cdiv(num_groups, BLOCK_G), tl.num_programs(0)):
        first = tl.full((), tile, tl.int64) * BLOCK_G
        values, scale = _rotated_tile(
            packed, code, absmax, nested_code, nested_absmax, nested_offset, first, num_groups, h,
            PER_BLOCK, NESTED_BLOCK_SIZE, NESTED, BLOCK_G,
        )  # fmt: skip
        g = tl.arange(0, BLOCK_G)
        largest = tl.max(tl.abs(values), 1) * tl.abs(scale)
        largest = tl.where(largest == largest, largest, float("inf")).to(tl.int32, bitcast=True)
        place = limits + (tile * BLOCK_G + g) // per_row
        tl.atomic_max(place, largest, mask=g < num_groups - first, sem="relaxed")


def takes(state: Nf4State) -> bool:
    """Return True if each group of a weight with whole groups has one block scale."""
    return state.block_size % GROUP == 0


def rotated_limits_(state: Nf4State, limits_O: Tensor, tile: GroupTile = LIMITS) -> None:
    """Raise the limits [O], int32 bits of floats, to the largest rotated |w| of each row."""
    _launch(_limits_kernel, state, (limits_O,), tile)


def rotated_codes_(state: Nf4State, scales_O: Tensor, codes_OD: Tensor, tile: GroupTile = CODES) -> None:
    """Write the codes of the rotated weight, contiguous [O, D]."""
    _launch(_codes_kernel, state, (scales_O, codes_OD), tile)


def _launch(kernel: object, state: Nf4State, given: tuple[Tensor, ...], tile: GroupTile) -> None:
    (rows, width), packed = state.shape, state.packed
    groups = rows * width // GROUP
    if not groups:
        return
    if packed.data_ptr() % WORD_BYTES or packed.storage_offset() % WORD_BYTES:
        packed = packed.clone()
    programs = min(triton.cdiv(groups, tile.groups), tile.per_processor * multiprocessors(packed))
    kernel[(programs,)](
        packed[: groups * GROUP // 2].view(torch.int32), state.code, state.absmax_M, state.nested_code,
        state.nested_absmax_S, state.nested_offset, *given, groups, width // GROUP,
        **_options(tile, state.block_size, state.nested_block_size, state.nested_code is not None),
    )  # fmt: skip


@functools.cache
def _options(tile: GroupTile, block_size: int, nested_block_size: int, nested: bool) -> dict[str, object]:
    return {
        "PER_BLOCK": block_size // GROUP, "NESTED_BLOCK_SIZE": nested_block_size, "NESTED": nested, "BLOCK_G": tile.groups,
        "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False,
    }  # fmt: skip
