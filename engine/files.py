"""Writing files and folders so that a crash at any moment leaves the old one or the new one, never a torn one. No torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` by `text`, atomically and flushed to disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Replace the folder `path` by what `fill(empty_folder)` writes.

    A folder cannot be renamed over a non-empty one, so the old one steps aside for an instant; `settle` mends a crash there.
    """
    settle(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, aside = _temporary(path), _aside(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        fill(temporary)
        for file in temporary.rglob("*"):
            _sync(file)
        if path.exists():
            path.rename(aside)
        temporary.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)


def settle(path: Path) -> None:
    """After a crash: bring back the old folder if the new one had not taken its place, and remove leftovers."""
    aside = _aside(path)
    if aside.exists() and not path.exists():
        aside.rename(path)
    shutil.rmtree(aside, ignore_errors=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
