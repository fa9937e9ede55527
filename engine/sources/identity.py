"""Identify what all trials of a sweep share, and refuse to go on with something else. No torch.

Losses compare only if every trial had the same samples, template, tokenizer and base model. The
sweep records their digests at its start. Each trial, each resume and the evaluation of the winner
find them again and compare.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from engine.config.trial import LoraConfig, ModelConfig, TrainConfig
from engine.errors import InputError, InputsChanged
from engine.sources.locate import locate
from engine.sources.weight_files import weight_files
from engine.system.checksums import content_digests, stamp
from engine.system.shared_cache import build_once
from engine.system.user_path import user_path

CONFIG_FILES = ("config.json", "generation_config.json", "*.py")
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
PARTS = {
    "commit": ("model.path", "its commit on the hub"),
    "config": ("model.path", "its config or code"),
    "weights": ("model.path", "its weights"),
    "tokenizer": ("model.path", "its tokenizer"),
    "adapter": ("lora.start_from", "the adapter that trials start from"),
    "template": ("data.chat_template", "the chat template"),
    "training": ("data.train", "the training samples"),
    "evaluation": ("data.eval", "the evaluation samples"),
}
"""Part -> the config's field that names it, and its name in messages. The cause comes before its effects."""
FIELDS = frozenset(field for field, _ in PARTS.values())
VERSION = 1  # of the remembered digest of weights
WEIGHTS_DIGEST = "digest"


def refuse_changed(config: TrainConfig, recorded: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise InputsChanged for the first part that is not what the sweep recorded at its start.

    Parts that were not recorded are not compared: older versions recorded fewer.
    """
    for part, (field, name) in {**_several(config), **PARTS}.items():
        before, now = recorded.get(variant(part, config), recorded.get(part)), found.get(part)
        if part == "adapter" and config.lora.start_digest not in (None, before):
            continue  # a start of the trial's own, whose digest is checked where it is read
        if before is not None and before != now:
            section, key = field.split(".")[:2]
            value = config.data.sources().get(field) or getattr(getattr(config, section), key)
            if field == "data.eval" and value is None:
                field, value = "data.train", config.data.train
            allowed = (
                f"{name} changed since the sweep began (digest then {before}, now {now or 'none'}), so losses would not compare; "
                "put the former back and resume, or start a new sweep, warm-started from this one (sweep.warm_start)"
            )
            if part.split("/")[0] in ("training", "evaluation"):
                allowed += ". If the file is the same, this version reads it in another way: resume with the version of the start"
            raise InputsChanged(str(InputError(field, value, allowed)))


def _several(config: TrainConfig) -> dict[str, tuple[str, str]]:
    """Return the parts of a mixture and of several evaluation sets, as PARTS has them."""
    data = config.data
    sources = {f"training/{i}": (f"data.train.{i}", f"source {i} of the mixture") for i in range(len(data.mixture))}
    return sources | {f"evaluation/{name}": (f"data.eval.{name}", f"the evaluation set {name}") for name in data.eval_sets}


def variant(part: str, config: TrainConfig) -> str:
    """Return the key of a part that data.template_kwargs changes: a space may vary them."""
    variables = config.data.template_kwargs
    return part if variables is None else f"{part} {short_digest(json.dumps(variables, sort_keys=True))}"


def is_input_fault(error: Exception, recorded: Mapping[str, str]) -> bool:
    """Tell whether the error means that a recorded input is no longer what it was.

    All inputs were readable when the sweep began. A hub that does not answer is no such fault.
    """
    if isinstance(error, InputsChanged):
        return True
    field = str(error.field).split(" ")[0] if isinstance(error, InputError) and error.field else ""
    field = ".".join(field.split(".")[:2])  # data.eval.general is one of several
    unrecorded = {"model.path": "weights", "lora.start_from": "adapter"}.get(field, "") not in {"", *recorded}
    return bool(recorded) and field in {*FIELDS, "file"} and not unrecorded


def identify_model(config: ModelConfig) -> dict[str, str]:
    """Return the digests of a model's files by part; of a model on the hub its commit alone.

    Weights are read once for each state of the files, and the cache remembers their digest. Their
    content counts, so a copy on another machine is the same model.
    """
    source = locate(config)
    if not Path(source).is_dir():
        commit = _commit(source, config.revision)
        return {} if commit is None else {"commit": commit}
    folder = Path(source)
    return {
        "config": _digest_of(folder, CONFIG_FILES),
        "tokenizer": _digest_of(folder, TOKENIZER_FILES),
        "weights": _weights_digest(folder, config.path),
    }


def identify_start(config: LoraConfig) -> dict[str, str]:
    """Return the digest of the adapter that trials start from, or nothing if they start anew."""
    return {} if config.start_from is None else {"adapter": _digest_of(user_path(config.start_from), ADAPTER_FILES)}


def refuse_other_start(config: LoraConfig) -> None:
    """Raise InputError if the adapter to start from is not the one of `lora.start_digest`."""
    if config.start_digest is not None and (found := identify_start(config)["adapter"]) != config.start_digest:
        is_there = any((user_path(config.start_from) / name).is_file() for name in ADAPTER_FILES)
        now = f"has files of digest {found}" if is_there else "holds no adapter any more"
        allowed = f"must be the adapter of lora.start_digest = {config.start_digest}, and {now}; put the former back"
        raise InputError("lora.start_from", config.start_from, allowed)


def short_digest(content: str) -> str:
    """Return 16 hex digits of a text."""
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _digest_of(folder: Path, patterns: tuple[str, ...]) -> str:
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return short_digest(json.dumps([(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]))


def _weights_digest(folder: Path, given: str) -> str:
    """Return the digest of the weights' content, remembered for the files' present stamps."""
    names = weight_files(folder, given)
    before = _stamps(folder, names)

    def build(target: Path) -> None:
        digest = short_digest(json.dumps(content_digests(folder, names), sort_keys=True))
        if _stamps(folder, names) != before:
            raise InputError("model.path", given, "its weights changed while they were read; wait until they are whole")
        (target / WEIGHTS_DIGEST).write_text(digest, encoding="utf-8")

    key = short_digest(json.dumps([VERSION, before]))
    return (build_once(f"weights-{key}", build) / WEIGHTS_DIGEST).read_text(encoding="utf-8")


def _stamps(folder: Path, names: list[str]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, str((folder / name).resolve()), stamp(folder / name)) for name in names]


def _commit(repository: str, revision: str | None) -> str | None:
    """Return the commit that this machine's hub cache has for the revision, or None if it has none."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "config.json", revision=revision or "main")
    return Path(found).parent.name if isinstance(found, str) else None
