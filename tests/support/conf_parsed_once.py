"""Let Hydra parse each file of conf/ once in a process of the tests, which composes hundreds of times."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hydra._internal.config_repository import ConfigRepository


@contextmanager
def conf_parsed_once() -> Iterator[None]:
    """Keep what Hydra read from a file, for as long as the file is the same."""
    load, known = ConfigRepository.load_config, {}

    def load_config(repository: ConfigRepository, config_path: str) -> object:
        key = (config_path, *(_state(source.path, config_path) for source in repository.sources))
        if key not in known:
            known[key] = load(repository, config_path)
        return copy.deepcopy(known[key])  # composing changes what it gets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigRepository, "load_config", load_config)
        yield


def _state(folder: str, config_path: str) -> tuple[str, int, int]:
    """Return the folder, and size and time of the file in it."""
    try:
        found = os.stat(os.path.join(folder, f"{config_path.removesuffix('.yaml')}.yaml"))
    except OSError:
        return folder, 0, 0
    return folder, found.st_size, found.st_mtime_ns
