"""Tell files that are not here from names that can only be on the Hugging Face hub."""

from __future__ import annotations

from engine.config.data_section import ON_TRAINING_SAMPLES, DataConfig
from engine.config.trial import HUB_ID
from engine.errors import InputError
from engine.sources.builtin import PREFIX
from engine.system.user_path import user_path

FILE_TYPES = (".jsonl", ".json", ".parquet", ".csv", ".txt", ".gz", ".zip", ".safetensors", ".gguf", ".bin", ".pt")


def is_only_on_hub(name: str) -> bool:
    """Return whether the name is a hub id, and neither a file or folder here nor a file's name."""
    path = user_path(name)
    return bool(HUB_ID.fullmatch(name)) and ".." not in name and path.suffix not in FILE_TYPES and not path.exists()


def refuse_missing_files(data: DataConfig) -> None:
    """Raise InputError for a data file or template that is not here, before a model is looked for."""
    for field, source in (("data.train", data.train), ("data.eval", data.eval)):
        named = source is not None and source != ON_TRAINING_SAMPLES and not source.startswith(PREFIX)
        if named and not user_path(source).exists() and not is_only_on_hub(source):
            allowed = "no such file; allowed: a .jsonl, .json or .parquet file, a hub id, builtin:<name>"
            raise InputError(field, source, allowed)
    template = data.chat_template
    if template not in (None, "chatml") and not user_path(template).is_file():
        allowed = "no such file; allowed: none (the tokenizer's own), chatml, or a Jinja file (.jinja, .jinja2, .j2)"
        raise InputError("data.chat_template", template, allowed)
