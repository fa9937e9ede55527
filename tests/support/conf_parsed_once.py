"""Let Hydra parse and compose the same once in a process of the tests, which composes hundreds of times."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_repository import ConfigRepository

from sweep.config import compose, conf_files


@contextmanager
def conf_parsed_once() -> Iterator[None]:
    """Keep what Hydra read from a file, and made of overrides, for as long as the files are the same.

    A pickle is kept, because composing changes what it gets. To read one takes a fifth of the time of
    a deep copy.
    """
    load, make = ConfigRepository.load_config, compose.hydra_compose
    loaded: dict[Any, bytes] = {}
    composed: dict[Any, bytes] = {}

    def load_config(repository: ConfigRepository, config_path: str) -> object:
        file = f"{config_path.removesuffix('.yaml')}.yaml"
        key = (config_path, *(_state(os.path.join(source.path, file)) for source in repository.sources))
        if key not in loaded:
            loaded[key] = pickle.dumps(load(repository, config_path))
        return pickle.loads(loaded[key])

    def hydra_compose(name: str, overrides: list[str]) -> object:
        folder = conf_files.conf_folder()
        key = (name, *overrides, *map(_state, sorted(Path(folder).rglob("*.yaml"))))
        if key not in composed:
            composed[key] = pickle.dumps(make(name, overrides))
        return pickle.loads(composed[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigRepository, "load_config", load_config)
        patch.setattr(compose, "hydra_compose", hydra_compose)
        yield


def _state(file: str | Path) -> tuple[str, int, int]:
    """Return the file, and its size and time."""
    try:
        found = os.stat(file)
    except OSError:
        return str(file), 0, 0
    return str(file), found.st_size, found.st_mtime_ns
