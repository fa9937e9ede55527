"""Read which base model an adapter folder names, and how much of that someone else may decide.

The folder may come from anyone. Its files say which model is loaded and how, but permission to run
a model's own code comes from the command line alone. A relative path is not followed: it would lead
to whatever lies where the command happens to run, or into the folder itself.
"""

from __future__ import annotations

from pathlib import Path

from engine.adapter.peft_files import find_train_config
from engine.adapter.portable import Adapter
from engine.config.permission import permitted
from engine.config.trial import HUB_ID, ModelConfig, TrainConfig
from engine.errors import InputError
from engine.sources.builtin import PREFIX, published_name, resolve_model
from engine.system.user_path import user_path


def read_origin(
    folder: Path, adapter: Adapter, *, config: TrainConfig | None = None, trust_remote_code: bool = False
) -> tuple[ModelConfig, TrainConfig | None]:
    """Return the base model of `adapter`, and the train config if there is one.

    config: a train config that the caller named; it may name another place for the same base model.
    None takes the file in or above `folder`. trust_remote_code: whether the caller allows the
    model's own code. InputError if the folder's two files name different base models, if a file of
    the folder names a relative path, or if code would run without permission.
    """
    named_by_caller = config is not None
    config = config or find_train_config(folder)
    model = config.model if config else ModelConfig(path=adapter.base, revision=adapter.revision)
    if not named_by_caller:
        _refuse_relative(model.path)
        if config and not is_same_base(model.path, adapter.base):
            allowed = f"must be the base model of adapter_config.json, {adapter.base!r}; if it was moved, export with --config"
            raise InputError("model.path", model.path, allowed)
    model = permitted(model, trust_remote_code)
    return model, config and config.model_copy(update={"model": model})


def _refuse_relative(path: str) -> None:
    """Refuse a path that depends on the working directory. A hub id is none, unless a folder has its name."""
    expanded = user_path(path)
    if path.startswith(PREFIX) or expanded.is_absolute():
        return
    if not HUB_ID.fullmatch(path) or ".." in path or expanded.exists():
        allowed = "a file of the adapter's folder must name an absolute path or a hub id that is no folder here"
        raise InputError("model.path", path, allowed)


def is_same_base(path: str, base: str) -> bool:
    """Tell whether both name one model; a builtin is known by its published name or its folder in the cache."""
    known = {path, str(user_path(path)), published_name(path)}
    return base in known or (path.startswith(PREFIX) and base == str(resolve_model(path)))
