"""Turn `model.path` into a folder or hub id that transformers can load. No torch."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.config.parsing import load_json
from engine.config.trial import HUB_ID, ModelConfig
from engine.errors import InputError
from engine.sources.builtin import resolve_model
from engine.sources.weight_files import INDEX, SINGLE, check_weights
from engine.system.user_path import user_path

ADAPTER = "adapter_config.json"


def locate(config: ModelConfig) -> str:
    """Return a folder or hub id that transformers can load.

    InputError for a folder without config.json or with an adapter, or a path that is neither.
    """
    source = str(resolve_model(config.path))
    path = user_path(source)
    if path.is_dir():
        refuse_adapter(path, config.path)
        if not (path / "config.json").is_file():
            raise InputError("model.path", config.path, "must be a Hugging Face model folder; config.json is not in it")
        return str(path)
    if not HUB_ID.fullmatch(source) or ".." in source:
        raise InputError("model.path", config.path, "no such folder; allowed: a model folder, a hub id, builtin:<name>")
    return source


def refuse_adapter(folder: Path, given: str) -> None:
    """Raise InputError if an adapter lies beside a model's files: transformers would add it to the weights."""
    if (folder / ADAPTER).is_file():
        way_out = "name its base model, and lora.start_from to go on from it; or merge it, or move that file away"
        raise InputError("model.path", given, f"must be a model, and holds an adapter ({ADAPTER}): {way_out}")


def local_folder(config: ModelConfig) -> Path | None:
    """Return the folder with the model's files on this machine; None for a hub id that is not downloaded whole.

    The files in a folder of the user's own are not looked at. Raises InputError as `locate` does.
    """
    source = locate(config)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, revision=config.revision, local_files_only=True))
        check_weights(folder, config.path)
    except Exception:  # of many kinds: nothing is there yet, or not all
        return None
    return folder


def download_weights(config: ModelConfig) -> None:
    """Fetch the weights of a hub id that are not here, in the files that transformers would choose.

    So their headers can be checked before anything is loaded. What goes wrong is left to transformers.
    """
    if local_folder(config) is not None:
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    source = locate(config)
    with suppress(Exception):  # of many kinds: offline, gated, no such files
        try:
            hf_hub_download(source, SINGLE, revision=config.revision)
        except EntryNotFoundError:
            index = hf_hub_download(source, INDEX, revision=config.revision)
            for name in sorted(set(load_json(Path(index))["weight_map"].values())):
                hf_hub_download(source, name, revision=config.revision)


def known_config(config: ModelConfig) -> dict[str, Any]:
    """Return the content of config.json if the model's is on this machine, else {}."""
    try:
        source = locate(config)
        if Path(source).is_dir():
            return load_json(Path(source, "config.json"))
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(source, "config.json", revision=config.revision or "main")
        return load_json(Path(found)) if isinstance(found, str) else {}
    except (InputError, OSError):
        return {}
