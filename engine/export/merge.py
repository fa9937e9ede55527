"""Merge the adapter into the base model's original weights.

W + lora_alpha / r * B A is summed in fp32 and rounded once, with one weight file in memory at a
time. With DoRA the rows of the sum then get the adapter's lengths.

The base is the publisher's 16-bit weights, not dequantised NF4, because others quantise from those.
FP8 and MXFP4 are unpacked, and the sum is rounded once too: the merged model has 16 bits. What a
16-bit model holds in fp32, such as a router's correction, stays as it is.
The adapter was trained against NF4, so the merged model differs from the trained one. The export
measures its loss instead of assuming it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.adapter.portable import Adapter
from engine.config.parsing import load_json
from engine.config.trial import HUB_ID, ModelConfig
from engine.errors import InputError, first_line
from engine.export.expert_parts import ExpertPart, expert_parts
from engine.export.stored_names import stored_names
from engine.model.pretrained import unpacked_weights
from engine.quant.unpacked_weights import UnpackedWeights
from engine.sources.packed_weights import packing_of
from engine.sources.quantized_folders import is_quantized
from engine.sources.weight_files import INDEX, SINGLE, check_weights, tensor_files
from engine.system.command_line import tell
from engine.system.user_path import user_path

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": None, "F64": None}
"""The dtype of a merged model by that of its base, as safetensors calls it; None: bfloat16."""
FILE_BYTES = 4 << 30  # of weights that were packed; as many are in memory at a time
COPIED = ("generation_config.json", "LICENSE*", "NOTICE*")


def base_folder(adapter: Adapter, source: str) -> Path:
    """Return the folder of the base model's original weights.

    A hub model is downloaded if the hub's cache lacks it. InputError if there is no such folder or
    hub model, or if its weights are not whole safetensors, or are NF4.
    """
    folder = user_path(source)
    if not folder.is_dir():
        if not HUB_ID.fullmatch(source):
            raise InputError("base_model_name_or_path", source, "no such folder; allowed: a model folder or a hub id")
        from huggingface_hub import snapshot_download

        try:
            patterns = ["*.safetensors", "*.json", "*.model", "*.txt"]
            folder = Path(snapshot_download(source, revision=adapter.revision, allow_patterns=patterns))
        except Exception as error:  # many kinds: offline, gated, unknown
            raise InputError("base_model_name_or_path", source, f"the hub did not deliver it ({first_line(error)})") from None
    check_weights(folder, source)
    content = load_json(folder / "config.json")
    if is_quantized(content) and packing_of(content) is None:
        allowed = "holds NF4 weights; allowed: --to peft or gguf-adapter, or the name of the 16-bit model they were made from"
        raise InputError("base_model_name_or_path", source, allowed)
    return folder


def find_targets(adapter: Adapter, files: dict[str, Path], model: ModelConfig) -> dict[str, str | ExpertPart]:
    """Return the tensor that holds each adapted layer's weight, as tensor name -> layer, or what it holds of experts.

    Tables with rows of trained tokens are among the layers. Raises InputError if a layer has no weight in
    the base, or one of another shape.
    """
    experts = expert_parts(adapter.experts, files, model) if adapter.experts else {}
    linears = {name: pair for name, pair in adapter.layers.items() if name not in adapter.experts}
    stored = stored_names([*linears, *adapter.token_rows], files, model)
    for name, (ids, rows_ND) in adapter.token_rows.items():
        shape = _shape_of(name, stored, files)
        if not (len(shape) == 2 and shape[1] == rows_ND.shape[1] and all(0 <= number < shape[0] for number in ids)):
            raise InputError("adapter", name, f"has rows {ids} of {rows_ND.shape[1]} values, the base model's table is {shape}")
    for name, (a_RD, b_OR) in linears.items():
        shape = _shape_of(name, stored, files)
        if shape != [b_OR.shape[0], a_RD.shape[1]]:
            raise InputError("adapter", name, f"fits a weight {[b_OR.shape[0], a_RD.shape[1]]}, the base model's is {shape}")
    return {key: name for name, key in stored.items()} | experts


def _shape_of(name: str, stored: Mapping[str, str], files: Mapping[str, Path]) -> list[int]:
    if (key := stored.get(name)) is None:
        raise InputError("adapter", name, f"the base model has no tensor {name}.weight")
    with safe_open(files[key], framework="pt") as opened:
        return list(opened.get_slice(key).get_shape())


def merged_dtype(files: dict[str, Path]) -> tuple[torch.dtype, bool]:
    """Return the dtype of most values that are not packed if it has 16 bits, else bfloat16, which has fp32's range.

    Also returns whether it is the former: then weights in fp32 are so on purpose.
    """
    sizes: Counter[str] = Counter()
    for file in set(files.values()):
        with safe_open(file, framework="pt") as opened:
            for part in map(opened.get_slice, opened.keys()):
                sizes[part.get_dtype()] += math.prod(part.get_shape())
    known = [name for name, _ in sizes.most_common() if name in DTYPES]
    if not known:
        raise InputError("base_model_name_or_path", str(next(iter(files.values()))), "holds no floating-point weight")
    return DTYPES[known[0]] or torch.bfloat16, DTYPES[known[0]] is not None


def merged_tensors(
    adapter: Adapter, file: Path, dtype: torch.dtype, targets: Mapping[str, str | ExpertPart], keeps_fp32: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one weight file, merged where the adapter has a layer.

    targets: what `find_targets` returned. keeps_fp32: weights in fp32 that are not adapted stay in
    it. InputError if a merged weight is out of the dtype's range.
    """
    with safe_open(file, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118
            yield key, merged(adapter, key, opened.get_tensor(key), dtype, targets.get(key), keeps_fp32)


def merged(
    adapter: Adapter, key: str, tensor: Tensor, dtype: torch.dtype, target: str | ExpertPart | None, keeps_fp32: bool
) -> Tensor:
    """Return a tensor of the base with the adapter in it, in `dtype`. target: from `find_targets`, None if it is not adapted."""
    if target is None and keeps_fp32 and tensor.dtype == torch.float32:
        return tensor
    if isinstance(target, ExpertPart):
        tensor = tensor.float() + adapter.scaling * target.delta(adapter.layers[target.layer], adapter.rank)
    elif target in adapter.token_rows:
        ids, rows_ND = adapter.token_rows[target]
        tensor = tensor.float().index_copy(0, torch.tensor(ids), rows_ND)
    elif target is not None:
        tensor = adapter.merged(target, tensor)
    if target is not None and not (torch.isfinite(tensor).all() and tensor.abs().max() <= torch.finfo(dtype).max):
        raise InputError("adapter", key, f"the merged weight is beyond what {dtype} can hold")
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def write_merged(adapter: Adapter, base: Path, target: Path, model: ModelConfig) -> None:
    """Write config.json and the weights to `target`, in the same files as the base has, if those are not packed.

    model: names `base` in another way. The caller adds the tokenizer.
    """
    packed = unpacked_weights(base, load_json(base / "config.json"), model)
    if packed is None:
        dtype = _write_same_files(adapter, base, target, model)
    else:
        dtype = _write_unpacked(adapter, packed, base, target, model)
    values = load_json(base / "config.json")
    values.pop("torch_dtype", None)
    values.pop("quantization_config", None)
    text = json.dumps(values | {"dtype": str(dtype).removeprefix("torch.")}, indent=2, ensure_ascii=False)
    (target / "config.json").write_text(text + "\n", encoding="utf-8")
    for pattern in COPIED:
        for file in base.glob(pattern):
            shutil.copy(file, target / file.name)


def _write_same_files(adapter: Adapter, base: Path, target: Path, model: ModelConfig) -> torch.dtype:
    """Write each weight file under its name; return the dtype."""
    files = tensor_files(base)
    targets, (dtype, keeps_fp32), total = find_targets(adapter, files, model), merged_dtype(files), 0
    names = sorted(set(files.values()))
    for done, file in enumerate(names):
        tell("merging weight files", done, len(names))
        tensors = dict(merged_tensors(adapter, file, dtype, targets, keeps_fp32))
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, target / file.name, metadata={"format": "pt"})
    if (base / INDEX).is_file():
        _write_index(target, total, {name: file.name for name, file in files.items()})
    return dtype


def _write_unpacked(adapter: Adapter, packed: UnpackedWeights, base: Path, target: Path, model: ModelConfig) -> torch.dtype:
    """Write the weights of an FP8 or MXFP4 folder in files of `FILE_BYTES`; return the dtype."""
    targets, content = find_targets(adapter, packed.files, model), load_json(base / "config.json")
    dtype = torch.float16 if content.get("dtype", content.get("torch_dtype")) == "float16" else torch.bfloat16
    keeps_fp32 = merged_dtype(packed.files)[1]
    parts = packed.parts(FILE_BYTES // dtype.itemsize)
    total, index = 0, {}
    for done, names in enumerate(parts):
        tell("merging weight files", done, len(parts))
        file = SINGLE if len(parts) == 1 else f"model-{done + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {}
        for name in names:
            found = packed.read(name, torch.float32 if name in targets else dtype)
            tensors[name] = merged(adapter, name, found, dtype, targets.get(name), keeps_fp32).contiguous()
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, target / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    if len(parts) > 1:
        _write_index(target, total, index)
    return dtype


def _write_index(target: Path, total: int, files: dict[str, str]) -> None:
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (target / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
