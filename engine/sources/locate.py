"""Turn `model.path` into a folder or hub id that transformers can load. No torch."""

from __future__ import annotations

from engine.config.trial import HUB_ID, ModelConfig
from engine.errors import InputError
from engine.sources.builtin import resolve_model
from engine.system.user_path import user_path

ADAPTER = "adapter_config.json"


def locate(config: ModelConfig) -> str:
    """Return a folder or hub id that transformers can load.

    InputError for a folder without config.json or with an adapter, or a path that is neither.
    """
    source = str(resolve_model(config.path))
    path = user_path(source)
    if path.is_dir():
        if (path / ADAPTER).is_file():  # transformers would add it to the weights that lie beside it
            way_out = "name its base model, and lora.start_from to go on from it; or merge it, or move that file away"
            raise InputError("model.path", config.path, f"must be a model, and holds an adapter ({ADAPTER}): {way_out}")
        if not (path / "config.json").is_file():
            raise InputError("model.path", config.path, "must be a Hugging Face model folder; config.json is not in it")
        return str(path)
    if not HUB_ID.fullmatch(source) or ".." in source:
        raise InputError("model.path", config.path, "no such folder; allowed: a model folder, a hub id, builtin:<name>")
    return source
