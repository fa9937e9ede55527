"""Check a model folder's weights before anything reads them. No torch.

They must be whole safetensors inside the folder. A `pytorch_model.bin` is a pickle, and unpickling
runs code of the file's choice. It is never read. A folder with nothing else is refused here, in one
line, before any trial starts.

Files may be links, because the hub's cache consists of links. Their names may not lead out of the
folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from engine.config.parsing import load_json
from engine.errors import InputError, first_line
from engine.sources.packed_weights import Header
from engine.sources.quantized_folders import ALLOWED

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
FIELD = "model.path"
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


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return tensor name -> file for weights that `check_weights` has passed.

    The headers decide, as in transformers: it reads every file that an index names, and does not ask
    the index where a tensor is.
    """
    return {name: path for path, _, names in opened_files(folder, str(folder)) for name in names}


def opened_files(folder: Path, given: str) -> Iterator[tuple[Path, Any, list[str]]]:
    """Yield each file of the weights, opened, with the names of its tensors. given: as in `check_weights`."""
    for name in read_files(folder, given):
        with safe_open(folder / name, framework="numpy") as opened:
            yield folder / name, opened, list(opened.keys())


def read_files(folder: Path, given: str) -> list[str]:
    """Return the files of the weights that transformers reads: it prefers the single file. given: as in `check_weights`."""
    names = [name for name in weight_files(folder, given) if name != INDEX]
    return [SINGLE] if SINGLE in names else names


def check_rows(shapes: Mapping[str, tuple[int, ...]], num_rows: int, given: str) -> None:
    """Raise InputError if no input embedding in the weights has the rows that config.json says. shapes: of all tensors."""
    ends = {name: name.removesuffix(".weight").rpartition(".")[2] for name, shape in shapes.items() if shape}
    found = [shapes[name][0] for name, end in ends.items() if end in EMBEDDINGS]
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


def tensor_shapes(folder: Path, given: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in the weights, by name. It reads headers only. given: as in `check_weights`."""
    return {name: tuple(file.get_slice(name).get_shape()) for _, file, names in opened_files(folder, given) for name in names}


def whole_numbers(folder: Path, given: str) -> list[str]:
    """Return the tensors that hold whole numbers or truth values. given: as in `check_weights`."""
    kinds = {name: file.get_slice(name).get_dtype() for _, file, names in opened_files(folder, given) for name in names}
    return [name for name, kind in kinds.items() if kind == "BOOL" or kind.startswith(("I", "U"))]


def tensor_headers(folder: Path, given: str) -> dict[str, Header]:
    """Return what the headers of the weights say of each tensor, by name. given: as in `check_weights`."""
    found = {}
    for path, file, names in opened_files(folder, given):
        for name in names:
            part = file.get_slice(name)
            found[name] = Header(path, tuple(part.get_shape()), str(part.get_dtype()))
    return found


def check_unused(names: Iterable[str], given: str) -> None:
    """Raise InputError if tensors that a model has no place for are scales, without which its weights are other numbers."""
    if found := [name for name in names if name.rpartition(".")[2] in SCALES]:
        allowed = f"holds quantised weights that its config.json does not name, with scales such as {found[0]}"
        raise InputError(FIELD, given, f"{allowed}; allowed: {ALLOWED}: take the 16-bit model")


def _indexed(index: Any, given: str) -> list[str]:
    """Return the files that an index names: plain names ending in .safetensors."""
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise InputError(FIELD, given, f"{INDEX} must hold a weight_map from tensor to file")
    for name in weights.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(FIELD, given, f"{INDEX} names {name!r}; allowed: .safetensors files of this folder")
    if not isinstance(index.get("metadata"), dict):  # transformers asks for it
        raise InputError(FIELD, given, f'{INDEX} lacks its metadata: add "metadata": {{}} to it')
    return sorted(set(weights.values()))


def _check_header(file: Path, given: str) -> None:
    try:
        with safe_open(file, framework="numpy") as opened:
            if not opened.keys():
                raise InputError(FIELD, given, f"{file.name} holds no tensor")
    except (OSError, SafetensorError) as error:
        raise InputError(FIELD, given, f"{file.name} must be a whole safetensors file ({first_line(error)})") from None
