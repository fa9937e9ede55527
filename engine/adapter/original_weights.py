"""Read single weights of the base model as its publisher wrote them, before any quantisation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from engine.config.parsing import load_json
from engine.config.trial import ModelConfig
from engine.errors import InputError
from engine.sources.locate import local_folder
from engine.sources.quantized_folders import is_quantized
from engine.sources.weight_files import tensor_files

FIELD = "lora.start"
DEPTH = "layers."


class OriginalWeights:
    """Find weights of linear layers in the model folder by the layers' names.

    Where a family's files put another prefix before the layers, the rest of the name decides.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._path, self._folder = config.path, local_folder(config)
        self._files: dict[str, Path] = {}
        self._by_end: dict[str, list[str]] = {}
        if self._folder is None:
            return
        if is_quantized(load_json(self._folder / "config.json")):
            allowed = f"needs the original weights, and {config.path} is quantised already; or: default, pissa"
            raise InputError(FIELD, "loftq", allowed)
        self._files = tensor_files(self._folder)
        for key in self._files:
            self._by_end.setdefault(_end(key), []).append(key)

    def check(self, names: Iterable[str]) -> None:
        """Raise InputError if a layer's weight is not in the folder. A model that is still to be downloaded passes."""
        if self._folder is not None:
            for name in names:
                self._key(name)

    def read(self, name: str) -> Tensor:
        """Return the weight [O, D] of a layer in its own dtype, on the CPU. Raises InputError if it is not there."""
        key = self._key(name)
        with safe_open(self._files[key], framework="pt") as opened:
            return opened.get_tensor(key)

    def _key(self, name: str) -> str:
        key = f"{name}.weight"
        if key in self._files:
            return key
        found = self._by_end.get(_end(key), [])
        if len(found) != 1:
            raise InputError(FIELD, "loftq", f"needs {key}, and the files of {self._path} do not name it; or: default, pissa")
        return found[0]


def _end(key: str) -> str:
    """Return the name from the list of layers on."""
    place = key.find(DEPTH)
    return key if place < 0 else key[place:]
