"""Make folders with FP8 weights as they are released, and folders with the same values in 32 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.tiny_models import byte_tokenizer

FP8_MAX = 448.0
BLOCK = (128, 128)
BLOCKS = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
ONE_SCALE = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}


def compressed(strategy: str, **weights: Any) -> dict[str, Any]:
    """Return a quantization_config of compressed-tensors."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy} | weights
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": None}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups, "ignore": ["lm_head"]}


def quantised(weight: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return FP8 values, their scales and the values that both stand for. kind: block, channel or tensor.

    It is the plain formula, block by block: the last blocks of a row or column may be smaller.
    """
    if weight.dim() == 3:
        parts = [quantised(one, kind) for one in weight]
        values, scales, meant = (torch.stack(part) for part in zip(*parts))
        return values, scales.view(-1, 1, 1) if kind == "tensor" else scales, meant
    height, width = weight.shape
    rows, columns = {"block": BLOCK, "channel": (1, width), "tensor": (height, width)}[kind]
    values, meant = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    scales = torch.empty(-(-height // rows), -(-width // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = weight[place].abs().max() / FP8_MAX
            values[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[place] = values[place].float() * scales[i, j]
    return values, scales.view(()) if kind == "tensor" else scales, meant


def save_pair(model: Any, folder: Path, settings: dict[str, Any], kind: str, **saved: Any) -> tuple[Path, Path]:
    """Save `model` with its layers' weights in FP8, and with what these stand for; return both folders.

    settings: the quantization_config; if it says that activations have static scales, these lie beside.
    saved: options of save_pretrained.
    """
    packed, plain = folder / "packed", folder / "plain"
    for one in (packed, plain):
        model.float().save_pretrained(one, **saved)
        byte_tokenizer().save_pretrained(one)
    stored, meant, end = {}, {}, "_scale" if settings["quant_method"] != "fp8" else "_scale_inv"
    for name, tensor in load_file(plain / "model.safetensors").items():
        stored[name] = meant[name] = tensor
        if tensor.dim() > 1 and "layers." in name and "gate.weight" not in name and "router" not in name:
            stored[name], stored[f"{name}{end}"], meant[name] = quantised(tensor, kind)
            if settings.get("activation_scheme") == "static":
                stored[f"{name.rpartition('.')[0]}.activation_scale"] = torch.tensor(0.5)
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(content | {"quantization_config": settings}))
    return packed, plain
