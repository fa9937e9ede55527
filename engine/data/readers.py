"""Read samples from JSONL, JSON, Parquet or the hub, and give each a name for messages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.config.trial import HUB_ID
from engine.errors import InputError, first_line
from engine.system.user_path import user_path

SUFFIXES = (".jsonl", ".json", ".parquet")


def open_samples(field: str, source: str, split: str) -> tuple[str, Iterator[tuple[str, Mapping[str, Any]]]]:
    """Return the identity of the content and an iterator over (name for messages, sample).

    Reading starts only when the iterator is used. InputError for a source that is no data file and
    no hub id.
    """
    path = user_path(source)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise InputError(field, source, f"allowed file types: {', '.join(SUFFIXES)}")
        digest = _digest(path)
        return digest, _read_file(field, path, digest)
    if path.suffix in SUFFIXES or path.is_dir() or not HUB_ID.fullmatch(source) or ".." in source:
        raise InputError(field, source, "no such file; allowed: a .jsonl, .json or .parquet file, a hub id, builtin:<name>")
    return _open_hub(field, source, split)


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _read_file(field: str, path: Path, digest: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the file's samples. InputError at the end if it is no longer the file of that digest."""
    try:
        yield from _read_parquet(field, path) if path.suffix == ".parquet" else _read_json(field, path)
    except UnicodeDecodeError as error:
        raise InputError(field, str(path), f"must be UTF-8 text ({error})") from None
    if _digest(path) != digest:
        raise InputError(field, str(path), "changed while it was read; start again once it is whole")


def _read_parquet(field: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        rows = (row for batch in parquet.ParquetFile(path).iter_batches() for row in batch.to_pylist())
        yield from ((f"{field} row {i}", row) for i, row in enumerate(rows, 1))
    except (OSError, pa.ArrowException) as error:
        raise InputError(field, str(path), f"must be a whole Parquet file ({first_line(error)})") from None


def _read_json(field: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8") as handle:
        if path.suffix == ".json":
            rows = _parse(field, handle.read())
            if not isinstance(rows, list):
                raise InputError(field, str(path), f"must hold a list of samples, not a {type(rows).__name__}")
            yield from ((f"{field} item {i}", row) for i, row in enumerate(rows, 1))
            return
        for i, line in enumerate(handle, 1):
            if line.strip():
                yield f"{field} line {i}", _parse(f"{field} line {i}", line)


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(where, text.strip()[:60], f"must be JSON ({error})") from None
    except RecursionError:
        raise InputError(where, text.strip()[:60], "must be JSON that is less deeply nested") from None


def _open_hub(field: str, source: str, split: str) -> tuple[str, Iterator[tuple[str, Mapping[str, Any]]]]:
    from datasets import load_dataset

    try:
        data = load_dataset(source, split=split)
    except Exception as error:  # many kinds: offline, missing, gated, no such split
        allowed = f"no such file, and the hub did not deliver it (split {split!r}): {first_line(error)}"
        raise InputError(field, source, allowed) from error
    return f"{source}@{data._fingerprint}", ((f"{field} row {i}", row) for i, row in enumerate(data, 1))
