"""Read from bitsandbytes' `Params4bit` the facts that dequantisation needs about one weight.

Shape letters: O output features, D input features, P packed bytes (two elements each), M blocks of
elements, S blocks of blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.errors import EngineError


@dataclass(frozen=True)
class Nf4State:
    """Hold views of one weight's tensors.

    Nothing is copied, so build it once the weight is on its device.

    Single quantisation: absmax_M is fp32 and the nested fields are None.

    Double quantisation: absmax_M is uint8, and the absmax of block m is nested_code[absmax_M[m]] *
    nested_absmax_S[m // nested_block_size] + nested_offset. It is computed in fp32 with a rounding
    after each operation.
    """

    packed: Tensor  # uint8 [P], element 2p in the high nibble of byte p
    shape: tuple[int, ...]  # (O, D)
    code: Tensor  # fp32 [16]
    absmax_M: Tensor
    block_size: int
    nested_code: Tensor | None = None  # fp32 [256]
    nested_absmax_S: Tensor | None = None  # fp32
    nested_offset: Tensor | None = None  # fp32 scalar
    nested_block_size: int = 256


def nf4_state(weight: Any) -> Nf4State:
    """Return the Nf4State of a weight; EngineError for a layout the kernels do not read.

    weight: packed data with a `quant_state`, as in bitsandbytes' Params4bit.
    """
    quant = weight.quant_state
    if getattr(quant, "quant_type", "nf4") != "nf4":
        raise EngineError(f"quant_type = {quant.quant_type!r}: must be nf4")
    if getattr(quant, "packing_format_for_cpu", False):
        raise EngineError("quant_state: bitsandbytes repacked it for CPU inference: load the weight again")
    if quant.blocksize & (quant.blocksize - 1) or quant.blocksize < 8:
        raise EngineError(f"quant_state.blocksize = {quant.blocksize}: must be a power of two of at least 8")
    packed = weight.data.contiguous().view(-1).view(torch.uint8)
    numel = math.prod(quant.shape)
    if packed.numel() < (numel + 1) // 2 or quant.absmax.numel() < -(-numel // quant.blocksize):
        raise EngineError(f"quant_state: {packed.numel()} bytes, {quant.absmax.numel()} blocks: too few for {list(quant.shape)}")
    plain = Nf4State(packed, tuple(quant.shape), quant.code.contiguous(), quant.absmax.contiguous(), quant.blocksize)
    if not quant.nested:
        return plain if plain.absmax_M.dtype == torch.float32 else replace(plain, absmax_M=plain.absmax_M.float())
    return replace(
        plain,
        nested_code=quant.state2.code.contiguous(),
        nested_absmax_S=quant.state2.absmax.contiguous(),
        nested_offset=quant.offset.to(plain.absmax_M.device, torch.float32),
        nested_block_size=quant.state2.blocksize,
    )
