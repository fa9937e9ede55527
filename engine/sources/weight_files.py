"""Check a model folder's weights before anything reads them. No torch.

They must be whole safetensors inside the folder. A `pytorch_model.bin` is a pickle, and unpickling
runs code of the file's choice. It is never read. A folder with nothing else is refused here, in one
line, before any trial starts.

Files may be links, because the hub's cache consists of links. Their names may not lead out of the
folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from engine.config.parsing import load_json
from engine.errors import InputError, first_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
FIELD = "model.path"
NF4_STATE = ".quant_state.bitsandbytes__nf4"  # behind a packed weight's name: JSON with the shape it had
MXFP4_BLOCKS, MXFP4_SCALES = "_blocks", "_scales"  # behind the name of a parameter of experts
SCALES = ("weight_scale", "weight_scale_inv", "SCB", "scales", "qzeros", "absmax")  # last names of scales of packed weights
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")  # last names of an input embedding


def check_weights(folder: Path, given: str) -> None:
    """Raise InputError if the folder's weights are missing, of another format or damaged.

    It reads headers only. given: the value of model.path, for the message.
    """
    for name in weight_files(folder, given):
        if name != INDEX:
            _check_header(folder / name, given)


def weight_files(folder: Path, given: str) -> list[str]:
    """Return the names of the files that hold the weights, with the index if there is one.

    Raises InputError if there are none. given: as in `check_weights`.
    """
    single = [SINGLE] if (folder / SINGLE).is_file() else []
    if (folder / INDEX).is_file():
        return [*_indexed(load_json(folder / INDEX), given), INDEX, *single]  # transformers prefers the single file
    if single:
        return single
    others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf") for path in folder.glob(pattern))
    found = f"; {others[0]} is never read: a pickle can run code" if others and not others[0].endswith("gguf") else ""
    raise InputError(FIELD, given, f"must hold its weights as safetensors ({SINGLE} or {INDEX}){found}")


def check_rows(folder: Path, num_rows: int, given: str) -> None:
    """Raise InputError if no input embedding in the weights has the rows that config.json says."""
    found = []
    for name, file in _tensor_files(folder).items():
        if name.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS:
            with safe_open(folder / file, framework="numpy") as opened:
                found.append(opened.get_slice(name).get_shape()[0])
    if found and num_rows not in found:
        rows = f"config.json says {num_rows:,} rows of the embedding, its weights hold {found[0]:,}"
        raise InputError(FIELD, given, f"{rows}: correct vocab_size")


def check_generation_config(folder: Path, given: str) -> None:
    """Raise InputError if generation_config.json is JSON, but no object. What is no JSON, transformers leaves out."""
    try:
        content = json.loads((folder / GENERATION).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    if not isinstance(content, dict):
        raise InputError(FIELD, given, f"{GENERATION} must hold a JSON object: correct or remove it")


def tensor_shapes(folder: Path, given: str, packed: bool) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in the weights, by name. It reads headers only.

    packed: the weights are bitsandbytes' NF4. Then each packed weight has the shape that it had
    before, and its scales are left out. Raises InputError if none is packed.
    """
    shapes, states = {}, {}
    names = [name for name in weight_files(folder, given) if name != INDEX]
    for file in [SINGLE] if SINGLE in names else names:  # transformers prefers the single file
        with safe_open(folder / file, framework="numpy") as opened:
            for name in list(opened.keys()):
                shapes[name] = tuple(opened.get_slice(name).get_shape())
                if packed and name.endswith(NF4_STATE):
                    states[name.removesuffix(NF4_STATE)] = _shape_before(opened.get_tensor(name).tobytes(), name, given)
    if packed and not states:
        raise InputError(FIELD, given, "holds no packed weight, though config.json says NF4: remove its quantization_config")
    scales = tuple(f"{name}." for name in states)
    return {n: states.get(n, shape) for n, shape in shapes.items() if not (scales and n.startswith(scales))}


def unpacked_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes with those that MXFP4 experts have after unpacking: blocks [E, O, G, 16] become [E, 32 G, O]."""
    kept = {name: shape for name, shape in shapes.items() if not name.endswith((MXFP4_BLOCKS, MXFP4_SCALES))}
    blocks = {name.removesuffix(MXFP4_BLOCKS): shape for name, shape in shapes.items() if name.endswith(MXFP4_BLOCKS)}
    return kept | {name: (shape[0], 2 * shape[2] * shape[3], shape[1]) for name, shape in blocks.items() if len(shape) == 4}


def check_unused(names: Iterable[str], given: str) -> None:
    """Raise InputError if tensors that a model has no place for are scales, without which its weights are other numbers."""
    if found := [name for name in names if name.rpartition(".")[2] in SCALES]:
        allowed = f"holds quantised weights that its config.json does not name, with scales such as {found[0]}"
        raise InputError(FIELD, given, f"{allowed}; allowed: 16 or 32 bits, or bitsandbytes NF4: take the 16-bit model")


def _shape_before(state: bytes, name: str, given: str) -> tuple[int, ...]:
    try:
        return tuple(int(width) for width in json.loads(state)["shape"])
    except (ValueError, KeyError, TypeError):
        raise InputError(FIELD, given, f"{name} must be JSON with the weight's shape") from None


def _tensor_files(folder: Path) -> dict[str, str]:
    if (folder / INDEX).is_file():
        return load_json(folder / INDEX)["weight_map"]
    with safe_open(folder / SINGLE, framework="numpy") as opened:
        return dict.fromkeys(opened.keys(), SINGLE)


def _indexed(index: Any, given: str) -> list[str]:
    """Return the files that an index names: plain names ending in .safetensors."""
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise InputError(FIELD, given, f"{INDEX} must hold a weight_map from tensor to file")
    for name in weights.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(FIELD, given, f"{INDEX} names {name!r}; allowed: .safetensors files of this folder")
    return sorted(set(weights.values()))


def _check_header(file: Path, given: str) -> None:
    try:
        with safe_open(file, framework="numpy") as opened:
            if not opened.keys():
                raise InputError(FIELD, given, f"{file.name} holds no tensor")
    except (OSError, SafetensorError) as error:
        raise InputError(FIELD, given, f"{file.name} must be a whole safetensors file ({first_line(error)})") from None
