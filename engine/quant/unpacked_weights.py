"""Unpack the weights of FP8 and MXFP4 folders one tensor at a time, while a model or an export reads them.

A tensor's packed bytes go to the device and are unpacked there, in fp32 and rounded once, or exactly
for MXFP4. What reads them sees the 16-bit folder that they stand for: transformers' own rules then
rename, stack and quantise its tensors as ever, and the 16-bit model exists nowhere.

Shape letters: E experts, O output features, D input features, G groups of 32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

VERSION = 1  # of the values that unpacking gives, for what is kept of them


class Stored(Protocol):
    """What is known of a tensor's place (engine/sources/packed_weights.py)."""

    file: Path
    key: str
    shape: tuple[int, ...]
    scale_file: Path | None
    scale: str | None


class UnpackedWeights:
    """Read the tensors of a folder as 16-bit weights; those that are not packed are returned as they are.

    files, shapes: of each tensor after unpacking, by name.
    """

    def __init__(self, stored: Mapping[str, Stored], block: tuple[int, int] | None, is_mxfp4: bool) -> None:
        """Take the places of all tensors. block: as in `unpack_fp8`."""
        self._stored, self._block, self._is_mxfp4 = stored, block, is_mxfp4
        self.files = {name: weight.file for name, weight in stored.items()}
        self.shapes = {name: weight.shape for name, weight in stored.items()}
        self._opened: dict[Path, Any] = {}

    def is_packed(self, name: str) -> bool:
        """Return True if the tensor has to be unpacked."""
        return self._stored[name].scale is not None

    def read(self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """Return a tensor on `device`, in `dtype` if it is packed and else in its own."""
        weight = self._stored[name]
        values = self._tensor(weight.file, weight.key).to(device)
        if weight.scale is None or weight.scale_file is None:
            return values
        scales = self._tensor(weight.scale_file, weight.scale).to(device)
        return unpack_mxfp4(values, scales, dtype) if self._is_mxfp4 else unpack_fp8(values, scales, self._block, dtype)

    def lazily(self, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """Return name -> what transformers takes for a tensor of a file, of which it asks for the whole by `[...]`."""
        return {name: _Lazy(self, name, dtype, device) for name in self._stored}

    def parts(self, most: int) -> list[list[str]]:
        """Return the names in groups, each of at most `most` values or of one tensor."""
        found, held = [[]], 0
        for name, weight in self._stored.items():
            size = math.prod(weight.shape)
            if found[-1] and held + size > most:
                found.append([])
                held = 0
            found[-1].append(name)
            held += size
        return found

    def _tensor(self, file: Path, key: str) -> Tensor:
        if file not in self._opened:
            self._opened[file] = safe_open(file, framework="pt")
        return self._opened[file].get_tensor(key)


class _Lazy:
    """Stand for one tensor until it is read."""

    def __init__(self, weights: UnpackedWeights, name: str, dtype: torch.dtype, device: torch.device) -> None:
        self._read = lambda: weights.read(name, dtype, device)

    def __getitem__(self, index: Any) -> Tensor:
        return self._read()[index]


def unpack_fp8(values: Tensor, scales: Tensor, block: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    """Return values times scales [.., O, D] in `dtype`: products in fp32, rounded once.

    values: float8_e4m3fn. scales: one for all, [.., O, 1] for rows, or [.., ceil(O / block[0]),
    ceil(D / block[1])]; blocks at the ends may be smaller.
    """
    scales = scales.float()
    if values.dim() == 3:  # one expert at a time in fp32
        out = torch.empty(values.shape, dtype=dtype, device=values.device)
        for expert, value_OD in enumerate(values):
            own = scales[expert] if scales.dim() == 3 and scales.shape[0] == len(values) else scales
            out[expert] = unpack_fp8(value_OD, own, block, dtype)
        return out
    if scales.numel() == 1:
        return (values.float() * scales.flatten()).to(dtype)
    if block is not None:
        height, width = values.shape
        scales = scales.repeat_interleave(block[0], 0)[:height].repeat_interleave(block[1], 1)[:, :width]
    return (values.float() * scales).to(dtype)


def unpack_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return experts [E, 32 G, O] from blocks [E, O, G, 16] and exponents [E, O, G], which 16 bits hold exactly."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).to(dtype)
