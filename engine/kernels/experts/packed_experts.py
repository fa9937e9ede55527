"""Hold the NF4 weights of all experts of one layer in one tensor of bytes, and read parts of it.

All experts [E, O, D] are quantised together as bitsandbytes does it: blocks of 64 along D, absmax
in 8 bits with double quantisation. An expert has whole blocks, so each can be read alone. One tensor
of bytes holds all parts, because nothing then casts or renames them on their way through files.

Shape letters: E experts, O output features, D input features, M blocks, S blocks of blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.errors import EngineError
from engine.kernels.nf4_state import Nf4State

BLOCK, NESTED_BLOCK = 64, 256
CODE, NESTED_CODE, OFFSET = 16, 256, 4  # fp32 values; three of the last four fill up to 16 bytes


@dataclass(frozen=True)
class PackedLayout:
    """The sizes of the parts of packed experts. double: absmax has 8 bits, else it is fp32."""

    shape: tuple[int, int, int]
    double: bool = True

    @property
    def num_blocks(self) -> int:
        return math.prod(self.shape) // BLOCK

    @property
    def parts(self) -> dict[str, int]:
        """Return the bytes of each part, in their order."""
        nested = -(-self.num_blocks // NESTED_BLOCK) if self.double else 0
        known = 4 * (CODE + NESTED_CODE + OFFSET)
        return {
            "packed": math.prod(self.shape) // 2,
            "tables": known,
            "nested": 4 * nested,
            "absmax": self.num_blocks * (1 if self.double else 4),
        }

    @property
    def num_bytes(self) -> int:
        return sum(self.parts.values())

    @classmethod
    def fits(cls, shape: tuple[int, ...]) -> bool:
        """Return True if each expert has whole blocks."""
        return len(shape) == 3 and shape[1] * shape[2] % BLOCK == 0


def pack(state: Nf4State, shape: tuple[int, int, int]) -> Tensor:
    """Return the bytes of experts that were quantised as one weight."""
    layout = PackedLayout(shape, state.nested_code is not None)
    if state.block_size != BLOCK or (layout.double and state.nested_block_size != NESTED_BLOCK):
        raise EngineError(f"blocks of {state.block_size} and {state.nested_block_size}: must be {BLOCK} and {NESTED_BLOCK}")
    blank = torch.zeros(NESTED_CODE, device=state.packed.device)
    offset = torch.zeros(OFFSET, device=state.packed.device)
    if layout.double:
        offset[0] = state.nested_offset
    tables = torch.cat([state.code.float(), state.nested_code.float() if layout.double else blank, offset])
    nested = [state.nested_absmax_S.float()] if layout.double else []
    parts = [state.packed[: math.prod(shape) // 2], tables, *nested, state.absmax_M]
    return torch.cat([part.contiguous().view(torch.uint8).flatten() for part in parts])


def unpack_state(packed: Tensor, shape: tuple[int, int, int]) -> Nf4State:
    """Return views of the parts of `packed` bytes. Raises EngineError for another number of bytes."""
    for double in (True, False):
        layout = PackedLayout(shape, double)
        if packed.numel() == layout.num_bytes:
            break
    else:
        raise EngineError(f"{packed.numel():,} bytes: no packed experts of {list(shape)}")
    data, tables, nested, absmax = packed.split(list(layout.parts.values()))
    code, nested_code, offset = tables.view(torch.float32).split([CODE, NESTED_CODE, OFFSET])
    state = Nf4State(data, shape, code, absmax if double else absmax.view(torch.float32), BLOCK)
    if not double:
        return state
    parts = {"nested_code": nested_code, "nested_absmax_S": nested.view(torch.float32), "nested_offset": offset[0]}
    return replace(state, **parts, nested_block_size=NESTED_BLOCK)


def dequantize_experts(state: Nf4State, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Return the weights of the experts first..last - 1 as [n, O, D], with the values of bitsandbytes.

    It is plain torch: the definition, and the path of devices without the kernels.
    """
    _, height, width = state.shape
    size = height * width
    data = state.packed[first * size // 2 : last * size // 2]
    nibbles = torch.stack([data >> 4, data & 15], dim=-1).view(-1, BLOCK)
    blocks = slice(first * size // BLOCK, last * size // BLOCK)
    absmax = state.absmax_M[blocks]
    if state.nested_code is not None:
        number = torch.arange(blocks.start, blocks.stop, device=data.device) // NESTED_BLOCK
        absmax = state.nested_code[absmax.long()] * state.nested_absmax_S[number] + state.nested_offset
    return (state.code[nibbles.long()] * absmax[:, None]).to(dtype).view(last - first, height, width)
