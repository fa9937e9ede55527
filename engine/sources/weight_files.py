"""Check a model folder's weights before anything reads them. No torch.

They must be whole safetensors inside the folder. A `pytorch_model.bin` is a pickle, and unpickling
runs code of the file's choice. It is never read. A folder with nothing else is refused here, in one
line, before any trial starts.

Files may be links, because the hub's cache consists of links. Their names may not lead out of the
folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from engine.config.parsing import load_json
from engine.errors import InputError, first_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIELD = "model.path"
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
