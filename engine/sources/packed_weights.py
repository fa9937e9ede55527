"""Find the weights of folders that are unpacked to 16 bits while they are read: FP8 and MXFP4. No torch.

FP8 is float8_e4m3fn with scales: one for a tensor, for each output feature, or for a block of
values. A weight is its FP8 values times their scales. The names are those of DeepSeek-V3
(`weight_scale_inv`, multiplied despite its name), fbgemm and compressed-tensors (`weight_scale`).
Rows and columns that fill no whole block have a scale of their own. MXFP4 is the
4-bit format of OCP Microscaling Formats, as gpt-oss has it for its experts.

Scales of activations are left out: inputs of layers stay in 16 bits, as where transformers
dequantises such a folder.

Shape letters: E experts, O output features, D input features, G groups of 32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import InputError

FIELD = "model.path"
MXFP4, FP8 = "mxfp4", "fp8"
FP8_DTYPE = "F8_E4M3"
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
WEIGHT_SCALES = ("_scale_inv", "_scale")  # behind a weight's name
ACTIVATION_SCALES = ("input_scale", "activation_scale", "input_scale_ub")  # last names, beside a weight
BLOCKS, SCALES = "_blocks", "_scales"  # of MXFP4, behind the name of a parameter of experts
UNPACKING = {"fp8": "FineGrainedFP8Config", MXFP4: "Mxfp4Config", "compressed-tensors": "CompressedTensorsConfig"}
"""Method -> class of transformers that takes `dequantize=True`."""
DEFAULT_BLOCK = (128, 128)  # of transformers, for fp8 without a key


@dataclass(frozen=True)
class Packing:
    """How a folder's weights are packed.

    kind: MXFP4 or FP8. block: output and input features of an FP8 weight that share a scale; None if a scale
    is for a tensor or an output feature.
    """

    kind: str
    block: tuple[int, int] | None = None


@dataclass(frozen=True)
class Header:
    """What a weight file says of a tensor. dtype: by safetensors' names."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class StoredWeight:
    """Where the values of an unpacked tensor lie.

    key, scale: names of tensors in the folder, each with its file; scale is None for a tensor that is
    not packed. shape: after unpacking.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    scale_file: Path | None = None
    scale: str | None = None


def packing_of(content: Mapping[str, Any]) -> Packing | None:
    """Return how the weights of a config.json are packed, or None if they are not, or in a way that is not unpacked here."""
    settings = content.get("quantization_config")
    if not isinstance(settings, dict):
        return None
    method = settings.get("quant_method")
    if method == MXFP4 and content.get("model_type") == "gpt_oss":
        return Packing(MXFP4)
    if method == "fp8" and settings.get("scale_fmt") in (None, "float", "ue8m0") and settings.get("expert_dtype", FP8) == FP8:
        return _fp8(settings.get("weight_block_size", DEFAULT_BLOCK))
    if method == "fbgemm_fp8":
        return Packing(FP8)
    return _compressed(settings) if method == "compressed-tensors" else None


def unpacking_class(content: Mapping[str, Any]) -> str | None:
    """Return transformers' config that unpacks a base with this config.json, which it does not quantise to NF4 itself.

    None for a base that is not packed.
    """
    return UNPACKING.get(content["quantization_config"].get("quant_method")) if packing_of(content) else None


def _fp8(block: Any) -> Packing | None:
    if block is None:
        return Packing(FP8)
    whole = isinstance(block, (list, tuple)) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    return Packing(FP8, tuple(block)) if whole else None


def _compressed(settings: Mapping[str, Any]) -> Packing | None:
    """Return the packing if all groups are plain FP8 with one kind of scales."""
    groups, sparse = settings.get("config_groups"), settings.get("sparsity_config") or {}
    if not isinstance(groups, dict) or not groups or settings.get("transform_config"):
        return None
    if not isinstance(sparse, dict) or sparse.get("format", "dense") != "dense":
        return None
    found = {_group(group, settings.get("format")) for group in groups.values()}
    return found.pop() if len(found) == 1 else None


def _group(group: Any, common: Any) -> Packing | None:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or (group.get("format") or common) not in ("float-quantized", "naive-quantized"):
        return None
    if weights.get("type") != "float" or weights.get("num_bits") != 8 or not weights.get("symmetric", True):
        return None
    if weights.get("strategy") == "block":
        return _fp8(weights.get("block_structure"))
    return Packing(FP8) if weights.get("strategy") in ("tensor", "channel") else None


def stored_weights(headers: Mapping[str, Header], packing: Packing, given: str) -> dict[str, StoredWeight]:
    """Return name -> what holds it, for each tensor of the unpacked model.

    given: the value of model.path. Raises InputError for a packed weight without scales that fit.
    """
    return _mxfp4_weights(headers) if packing.kind == MXFP4 else _fp8_weights(headers, packing.block, given)


def _mxfp4_weights(headers: Mapping[str, Header]) -> dict[str, StoredWeight]:
    """Blocks [E, O, G, 16] become [E, 32 G, O]."""
    found = {}
    for key, header in headers.items():
        name, shape = key.removesuffix(BLOCKS), header.shape
        if key.endswith(BLOCKS) and len(shape) == 4 and f"{name}{SCALES}" in headers:
            shape = (shape[0], 2 * shape[2] * shape[3], shape[1])
            scale = f"{name}{SCALES}"
            found[name] = StoredWeight(header.file, key, shape, headers[scale].file, scale)
        elif not key.endswith((BLOCKS, SCALES)):
            found[key] = StoredWeight(header.file, key, shape)
    return found


def _fp8_weights(headers: Mapping[str, Header], block: tuple[int, int] | None, given: str) -> dict[str, StoredWeight]:
    found, read = {}, set()
    for key, header in headers.items():
        scale = next((key + end for end in WEIGHT_SCALES if key + end in headers), None)
        if header.dtype != FP8_DTYPE:
            if scale is not None and header.dtype[0] in "IU":  # two values of 4 bits in a byte
                raise InputError(FIELD, given, f"{key} is {header.dtype} in a folder of FP8: take the 16-bit model")
            continue
        if scale is None:
            raise InputError(FIELD, given, f"{key} is FP8 without a scale beside it: take the 16-bit model")
        fit_scales(headers[scale], header.shape, block, f"{key} of {given}")
        found[key] = StoredWeight(header.file, key, header.shape, headers[scale].file, scale)
        read |= {scale, *(f"{key.rpartition('.')[0]}.{name}" for name in ACTIVATION_SCALES)}
    if not found:
        raise InputError(FIELD, given, "holds no FP8 weight, though config.json says FP8: remove its quantization_config")
    others = {key: header for key, header in headers.items() if key not in found and key not in read}
    return found | {key: StoredWeight(header.file, key, header.shape) for key, header in others.items()}


def fit_scales(scale: Header, shape: tuple[int, ...], block: tuple[int, int] | None, name: str) -> None:
    """Raise InputError unless the scales are one for the tensor, for each output feature, or for each block.

    shape: [O, D], or [E, O, D]. name: of the weight, for the message.
    """
    lead, last = shape[:-2], shape[-2:]
    parts = (*last[:1], 1) if block is None else tuple(-(-n // size) for n, size in zip(last, block))
    allowed = {(), (1,), (*lead, 1, 1), (*lead, *parts)}
    if len(last) < 2 or scale.shape not in allowed or scale.dtype not in SCALE_DTYPES:
        per = "for the tensor or each row" if block is None else f"for blocks of {block[0]} x {block[1]}"
        what = f"{list(scale.shape)} in {scale.dtype} for a weight {list(shape)}"
        raise InputError(FIELD, name, f"must have scales {per}, and has {what}: take the 16-bit model")
