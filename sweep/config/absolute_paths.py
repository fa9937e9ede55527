"""Make a config's relative paths absolute, so that a sweep can be resumed from any folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from engine.config.data_section import ON_TRAINING_SAMPLES
from engine.config.data_sources import SourceConfig
from engine.system.user_path import names_something, user_path
from sweep.config.sweep import SweepConfig

FIELDS = (("model", "path"), ("data", "train"), ("data", "eval"), ("data", "chat_template"), ("lora", "start_from"))
SQLITE = "sqlite:///"
NAMES = {("data", "chat_template"): ("chatml",), ("data", "eval"): (ON_TRAINING_SAMPLES,)}
"""Values that are no path, even if there is a file of that name: for the file, write ./chatml."""


def with_absolute_paths(config: SweepConfig, folder: Path) -> SweepConfig:
    """Return the config with `~` expanded, and the paths of existing files and folders absolute.

    folder: relative paths start here. A name that is no file or folder there stays as it is, since
    it may be a hub id.
    """
    changes: dict[str, dict[str, object]] = {"sweep": {"output_dir": os.path.expanduser(config.sweep.output_dir)}}
    for section, field in FIELDS:
        value = getattr(getattr(config, section), field)
        changes.setdefault(section, {})[field] = _absolute(value, folder, NAMES.get((section, field), ()))
    changes["sweep"]["warm_start"] = tuple(absolute_path(path, folder) for path in config.sweep.warm_start)
    if config.tracking.uri is not None:
        changes["tracking"] = {"uri": absolute_uri(config.tracking.uri, folder)}
    updated = {section: getattr(config, section).model_copy(update=fields) for section, fields in changes.items()}
    return config.model_copy(update=updated)


def _absolute(value: Any, folder: Path, names: tuple[str, ...]) -> Any:
    """Return a path, list, mixture or mapping of evaluation sets with absolute paths. names: values that are no path."""
    if value is None or value in names:
        return value
    if isinstance(value, SourceConfig):
        return value.model_copy(update={"path": _absolute(value.path, folder, names)})
    if isinstance(value, dict):
        return {name: _absolute(one, folder, names) for name, one in value.items()}
    return absolute_path(value, folder) if isinstance(value, str) else tuple(_absolute(one, folder, ()) for one in value)


def absolute_path(text: str, folder: Path) -> str:
    """Return what the text names, seen from the folder; the text itself if nothing there fits it."""
    if names_something(text, folder):
        return str(folder / user_path(text))
    return str(user_path(text)) if text.startswith("~") else text


def absolute_uri(uri: str, folder: Path) -> str:
    """Return the address of an SQLite file with its path absolute, and any other as it is."""
    path = user_path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or (path.is_absolute() and str(path) == uri.removeprefix(SQLITE)):
        return uri
    return f"{SQLITE}{path if path.is_absolute() else f'{quoted_path(folder)}/{path}'}"


def sqlite_uri(file: Path) -> str:
    """Return the address of an SQLite file. In an address, `%` and `?` have a meaning of their own."""
    return f"{SQLITE}{quoted_path(file.absolute())}"


def sqlite_file(uri: str) -> Path:
    """Return the file that an SQLite address names."""
    return Path(unquote(uri.removeprefix(SQLITE).partition("?")[0]))


def quoted_path(path: Path) -> str:
    return str(path).translate({ord(char): quote(char) for char in "%?"})
