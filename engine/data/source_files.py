"""Find what a data source names: files, a folder, a pattern, a saved data set, or the hub.

Its identity covers the content of every file in the order in which they are read.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.trial import HUB_ID
from engine.errors import InputError, first_line
from engine.sources.hub_ids import COMPRESSIONS, KINDS
from engine.system.user_path import user_path

ALLOWED = f"{', '.join(KINDS)}, and text files with {', '.join(COMPRESSIONS)} behind it"
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")  # of the hub and of `datasets`, beside the data
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # of datasets.save_to_disk


@dataclass(frozen=True)
class NamedSource:
    """What a config says about one data set. name, revision and files: of a hub data set."""

    field: str
    paths: tuple[str, ...]
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    files: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return ", ".join(self.paths)

    def option(self, name: str) -> str:
        """Return the field of an option: data.train_split, or data.eval.general.split of one of several."""
        return f"{self.field}{'.' if self.field.count('.') > 1 else '_'}{name}"


@dataclass(frozen=True)
class FoundSource:
    """Hold local files in their order with their digests, or one opened data set of `datasets`."""

    identity: str
    files: tuple[Path, ...] = ()
    digests: tuple[str, ...] = ()
    dataset: Any = None


def find_source(source: NamedSource) -> FoundSource:
    """Return what the source names. InputError if nothing is there, or not all of it can be read."""
    if len(source.paths) == 1:
        path = user_path(source.paths[0])
        if os.path.isdir(path):
            return _folder(source, path)
        if not os.path.isfile(path) and not _has_magic(path):
            return _hub(source)
    files = tuple(file for text in source.paths for file in _named_files(source, text))
    _refuse_options(source, "a file", "split", "name", "revision", "files")
    return _found(files)


def kind_of(path: Path) -> tuple[str, str] | None:
    """Return (kind, compression or ""), such as (".jsonl", ".gz"); None for other files."""
    name = path.name.lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    kind = Path(name.removesuffix(compression)).suffix
    return (kind, compression) if kind in KINDS and not (compression and kind == ".parquet") else None


def _named_files(source: NamedSource, text: str) -> list[Path]:
    """Return the file, or the pattern's files by name."""
    path = user_path(text)
    if os.path.isfile(path):  # unlike Path.is_file, it takes names of any length
        found = [path]
    elif os.path.isdir(path):
        raise InputError(source.field, text, "a list holds files and patterns; name a folder alone, or its files as a pattern")
    elif _has_magic(path):
        found = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())
        if not found:
            raise InputError(source.field, text, "no file matches this pattern")
    else:
        raise InputError(source.field, text, "no such file; a list holds local files and patterns only")
    for file in found:
        if kind_of(file) is None:
            raise InputError(source.field, str(file), f"allowed file types: {ALLOWED}")
    return found


def _has_magic(path: Path) -> bool:
    return glob.has_magic(str(path))


def _folder(source: NamedSource, path: Path) -> FoundSource:
    _refuse_options(source, "a folder", "revision", "files")
    if (path / SAVED).is_file() or (path / SAVED_SPLITS).is_file():
        return _saved(source, path)
    return _found(_files_of_split(source, path))


def _files_of_split(source: NamedSource, path: Path) -> list[Path]:
    """Return the folder's files of one split, by the rules that `datasets` has for file names."""
    from datasets import load_dataset_builder

    try:
        found = load_dataset_builder(str(path), name=source.name).config.data_files or {}
    except Exception as error:  # no data files, or a broken README
        raise InputError(source.field, str(path), f"holds no data set ({first_line(error)}); allowed: {ALLOWED}") from None
    splits = {str(split): [Path(file) for file in files] for split, files in found.items()}
    if source.split not in splits:
        raise InputError(source.option("split"), source.split, f"{path} has {', '.join(splits) or 'no data'}")
    if source.name is None:
        known = {file.resolve() for files in splits.values() for file in files}
        present = (file for file in sorted(path.rglob("*")) if file.is_file() and kind_of(file))
        hidden = (file for file in present if not any(part.startswith(".") for part in file.relative_to(path).parts))
        extra = [file.relative_to(path) for file in hidden if file.resolve() not in known and file.name not in DESCRIPTIONS]
        if extra:
            why = "which its split names or file types leave out; name the files as a list or a pattern"
            raise InputError(source.field, str(path), f"also holds {', '.join(map(str, extra[:3]))}, {why}")
    for file in splits[source.split]:
        if kind_of(file) is None:
            raise InputError(source.field, str(file), f"allowed file types: {ALLOWED}")
    return splits[source.split]


def _saved(source: NamedSource, path: Path) -> FoundSource:
    from datasets import load_from_disk

    _refuse_options(source, "a saved data set", "name")
    folder = path
    if (path / SAVED_SPLITS).is_file():
        folder = path / source.split
        if not (folder / SAVED).is_file():
            splits = sorted(child.name for child in path.iterdir() if (child / SAVED).is_file())
            raise InputError(source.option("split"), source.split, f"{path} has {', '.join(splits) or 'no data'}")
    else:
        _refuse_options(source, "a saved data set without splits", "split")
    try:
        dataset = load_from_disk(str(folder))
    except Exception as error:  # many kinds: a lost file, another version, no Arrow
        raise InputError(source.field, str(folder), f"must be a whole saved data set ({first_line(error)})") from None
    return FoundSource(_found(sorted(file for file in folder.iterdir() if file.is_file())).identity, dataset=dataset)


def _hub(source: NamedSource) -> FoundSource:
    text = source.paths[0]
    if kind_of(Path(text)) or not HUB_ID.fullmatch(text) or ".." in text:
        kinds = f"a file or folder ({ALLOWED}), a pattern, a hub id, builtin:<name>"
        raise InputError(source.field, text, f"no such file; allowed: {kinds}")
    from datasets import load_dataset

    files = None if source.files is None else list(source.files)
    try:
        data = load_dataset(text, source.name, split=source.split, revision=source.revision, data_files=files)
    except Exception as error:  # many kinds: offline, missing, gated, no such split
        allowed = f"no such file, and the hub did not deliver it (split {source.split!r}): {first_line(error)}"
        raise InputError(source.field, text, allowed) from error
    return FoundSource(f"{text}@{data._fingerprint}", dataset=data)


def _refuse_options(source: NamedSource, what: str, *options: str) -> None:
    """Raise InputError for an option that would have no effect."""
    for option in options:
        value = getattr(source, option)
        if value not in (None, "train"):
            raise InputError(source.option(option), value, f"has no effect on {what}, {source}; leave it out")


def _found(files: Sequence[Path]) -> FoundSource:
    digests = tuple(map(file_digest, files))
    parts = [f"{digest} {''.join(kind_of(file) or ())}" for digest, file in zip(digests, files)]  # a kind says how it is read
    identity = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return FoundSource(identity, tuple(files), digests)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of the file's content, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
