"""Provide a model and a data set, `builtin:<name>`, so that the first sweep needs no download.

They are built on first use from installed packages and kept in the cache
(engine/system/shared_cache.py). No torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from engine.errors import InputError
from engine.sources import order_pairs, orders, smollm2, stdlib_docs

PREFIX = "builtin:"
MODELS: dict[str, Callable[[], Path]] = {"smollm2-135m-instruct": smollm2.ensure}
PUBLISHED = {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
DATA_SETS: dict[str, Callable[[], tuple[Path, Path]]] = {
    "order-pairs": order_pairs.ensure, "orders": orders.ensure, "stdlib-docs": stdlib_docs.ensure,
}  # fmt: skip
T = TypeVar("T")


def resolve_model(path: str) -> Path | str:
    """Return the Hugging Face folder of a `builtin:` model, and any other path unchanged.

    The first use builds the folder in about 5 s.
    """
    return _builtin("model.path", path, MODELS)() if path.startswith(PREFIX) else path


def published_name(path: str) -> str | None:
    """Return the hub id of a `builtin:` model, for people without the tool; None for others."""
    return PUBLISHED.get(path.removeprefix(PREFIX)) if path.startswith(PREFIX) else None


def resolve_data(path: str, field: str = "data.train") -> tuple[Path, Path] | None:
    """Return the (train, eval) JSONL files of a `builtin:` data set; None for any other path.

    The first use builds them in about 5 s.
    """
    return _builtin(field, path, DATA_SETS)() if path.startswith(PREFIX) else None


def _builtin(field: str, path: str, known: dict[str, T]) -> T:
    maker = known.get(path.removeprefix(PREFIX))
    if maker is None:
        raise InputError(field, path, f"unknown builtin; known: {', '.join(PREFIX + name for name in sorted(known))}")
    return maker
