"""Model and data set that come with the tool, so that the first sweep needs no download: `builtin:<name>`.

They are made on first use from packages already installed and kept in the cache (see `engine/cache.py`); no torch is loaded here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from engine.errors import InputError
from engine.sources import smollm2, stdlib_docs

PREFIX = "builtin:"
MODELS: dict[str, Callable[[], Path]] = {"smollm2-135m-instruct": smollm2.ensure}
PUBLISHED = {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
DATA_SETS: dict[str, Callable[[], tuple[Path, Path]]] = {"stdlib-docs": stdlib_docs.ensure}
T = TypeVar("T")


def resolve_model(path: str) -> Path | str:
    """The Hugging Face folder of a `builtin:` model, made on first use (about 5 s); any other path is returned as it is."""
    return _builtin("model.path", path, MODELS)() if path.startswith(PREFIX) else path


def published_name(path: str) -> str | None:
    """The hub id that a `builtin:` model is published under, for whoever has no such builtin; None for any other path."""
    return PUBLISHED.get(path.removeprefix(PREFIX)) if path.startswith(PREFIX) else None


def resolve_data(path: str) -> tuple[Path, Path] | None:
    """(train, eval) JSONL files of a `builtin:` data set, made on first use (about 5 s); None for any other path."""
    return _builtin("data.train", path, DATA_SETS)() if path.startswith(PREFIX) else None


def _builtin(field: str, path: str, known: dict[str, T]) -> T:
    maker = known.get(path.removeprefix(PREFIX))
    if maker is None:
        raise InputError(field, path, f"unknown builtin; known: {', '.join(PREFIX + name for name in sorted(known))}")
    return maker
