"""The rule by which `lora.target_modules` picks layers. No torch."""

from __future__ import annotations

import re

from engine.config.trial import ALL_LINEAR
from engine.errors import InputError, did_you_mean


def resolve_targets(linear_names: list[str], target_modules: str | tuple[str, ...]) -> list[str]:
    """Full names of the layers that `target_modules` picks.

    `all-linear`: every one. A list: each entry matches a whole name or its dotted end (`q_proj`, `mlp.up_proj`). A string with
    other characters than those of a name: a regular expression over the whole name, as in PEFT.
    """
    if target_modules == ALL_LINEAR:
        return list(linear_names)
    if isinstance(target_modules, str) and not re.fullmatch(r"[\w.\-]+", target_modules):
        return _regex_targets(linear_names, target_modules)
    entries = (target_modules,) if isinstance(target_modules, str) else target_modules
    chosen: set[str] = set()
    for entry in entries:
        hits = [name for name in linear_names if name == entry or name.endswith(f".{entry}")]
        if not hits:
            raise InputError("lora.target_modules", entry, _near(entry, linear_names))
        chosen.update(hits)
    return [name for name in linear_names if name in chosen]


def _regex_targets(linear_names: list[str], pattern: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError("lora.target_modules", pattern, f"must be a valid regular expression ({error})") from None
    hits = [name for name in linear_names if compiled.fullmatch(name)]
    if not hits:
        raise InputError("lora.target_modules", pattern, f"must match whole layer names such as {linear_names[0]!r}")
    return hits


def _near(entry: str, linear_names: list[str]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in linear_names})
    hint = did_you_mean(entry.rpartition(".")[2], ends, num=3, cutoff=0.4)
    return f"matches no linear layer; allowed: all-linear, {', '.join(ends)}{hint}"
