"""Tell files that are not here from names that can only be on the Hugging Face hub."""

from __future__ import annotations

import os

from engine.config.data_section import ON_TRAINING_SAMPLES, DataConfig, as_list
from engine.config.trial import HUB_ID
from engine.errors import InputError
from engine.sources.builtin import PREFIX
from engine.system.user_path import names_something, user_path

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
"""The kinds of data files that are read, and what may stand behind those of text."""
FILE_TYPES = (*KINDS, *COMPRESSIONS, ".txt", ".zip", ".safetensors", ".gguf", ".bin", ".pt")


def is_only_on_hub(name: str | tuple[str, ...]) -> bool:
    """Return whether the name is a hub id, and neither a file or folder here nor a file's name.

    A list holds local files alone.
    """
    if not isinstance(name, str):
        return False
    path = user_path(name)
    return bool(HUB_ID.fullmatch(name)) and ".." not in name and path.suffix not in FILE_TYPES and not os.path.exists(path)


def refuse_missing_files(data: DataConfig) -> None:
    """Raise InputError for a data file or template that is not here, before a model is looked for."""
    for field, source in data.sources().items():
        for name in () if source == ON_TRAINING_SAMPLES or is_only_on_hub(source or ()) else as_list(source):
            if not name.startswith(PREFIX) and not names_something(name):
                allowed = "no such file; allowed: a file, folder, pattern (*.jsonl) or list of files, a hub id, builtin:<name>"
                raise InputError(field, name, allowed)
    template = data.chat_template
    if template not in (None, "chatml") and not os.path.isfile(user_path(template)):
        allowed = "no such file; allowed: none (the tokenizer's own), chatml, or a Jinja file (.jinja, .jinja2, .j2)"
        raise InputError("data.chat_template", template, allowed)
