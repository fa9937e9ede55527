"""Apply `lora.target_modules`, `lora.rank_pattern` and `lora.alpha_pattern`: pick layers by their names. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard

from engine.config.lora_section import ALL_LINEAR, LoraConfig
from engine.errors import InputError, did_you_mean

ATTENTION, EXPERTS = "attention", "experts"
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


def is_expert(name: str) -> bool:
    """Return True for the name of a weight of all experts of a layer, which PEFT adapts by `target_parameters`."""
    path, _, weight = name.rpartition(".")
    return weight in EXPERT_WEIGHTS and path.rpartition(".")[2] == EXPERTS


def _in_attention(name: str) -> bool:
    return any("attn" in part or "attention" in part for part in name.split(".")[:-1])


GROUPS: dict[str, Callable[[str], bool]] = {
    ALL_LINEAR: lambda name: not is_expert(name),
    ATTENTION: _in_attention,
    EXPERTS: is_expert,
}
"""Names of groups of layers. As in PEFT, `all-linear` has no experts, whose weights are no linear layers."""


def target_rule(target_modules: str | tuple[str, ...]) -> Callable[[str], bool]:
    """Return a test that says whether `target_modules` picks the layer of a full name.

    - A name of GROUPS, alone or in a list, picks the group.
    - An entry of a list picks a whole name or its dotted end (`q_proj`, `mlp.up_proj`).
    - A string with characters that no name has is a regular expression over the whole name, as in
      PEFT. Raises InputError if it is not valid.
    """
    if isinstance(target_modules, str) and target_modules in GROUPS:
        return GROUPS[target_modules]
    if _is_regex(target_modules):
        try:
            compiled = re.compile(target_modules)
        except re.error as error:
            allowed = f"must be a valid regular expression ({error})"
            raise InputError("lora.target_modules", target_modules, allowed) from None
        return lambda name: compiled.fullmatch(name) is not None
    entries = _entries(target_modules)
    groups, ends = [GROUPS[entry] for entry in entries if entry in GROUPS], [entry for entry in entries if entry not in GROUPS]
    return lambda name: any(is_in(name) for is_in in groups) or any(name == end or name.endswith(f".{end}") for end in ends)


def resolve_targets(linear_names: list[str], target_modules: str | tuple[str, ...]) -> list[str]:
    """Return the full names that `target_modules` picks, in the order of `linear_names`.

    Raises InputError if an entry matches no name.
    """
    is_target = target_rule(target_modules)
    if _is_regex(target_modules) and not any(map(is_target, linear_names)):
        allowed = f"must match whole layer names such as {linear_names[0]!r}"
        raise InputError("lora.target_modules", target_modules, allowed)
    if target_modules != ALL_LINEAR and not _is_regex(target_modules):
        for entry in _entries(target_modules):
            if not any(map(target_rule((entry,)), linear_names)):
                raise InputError("lora.target_modules", entry, _near(entry, linear_names))
    return [name for name in linear_names if is_target(name)]


def pattern_value(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first key that matches the name, or its dotted end, as PEFT's patterns do."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def layer_ranks(lora: LoraConfig, names: Iterable[str]) -> dict[str, int]:
    """Return the rank of each of these layers, which the adapter targets, with the frozen half of PiSSA.

    Raises InputError if an entry of `lora.rank_pattern` matches none of them, or if two give one
    layer different ranks: a config does not keep the order of its entries.
    """
    names = list(names)
    found = _by_pattern("rank", lora.rank_pattern, names)
    return {name: lora.halves * found.get(name, lora.rank) for name in names}


def layer_scalings(lora: LoraConfig, ranks: Mapping[str, int]) -> dict[str, float]:
    """Return the factor of B A of each of these layers: lora.scaling, or what its alpha in `lora.alpha_pattern` gives.

    ranks: of `layer_ranks`. Raises InputError as it does.
    """
    found = _by_pattern("alpha", lora.alpha_pattern, ranks)
    return {
        name: found[name] / lora.divisor(rank // lora.halves) if name in found else lora.scaling for name, rank in ranks.items()
    }


def _by_pattern(what: str, pattern: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the value of each layer that an entry of `lora.<what>_pattern` names."""
    values, unused, ends = {}, set(pattern), set()
    for name in names:
        found = {key: value for key, value in pattern.items() if pattern_value({key: True}, name, False)}
        if len(set(found.values())) > 1:
            raise InputError(f"lora.{what}_pattern", found, f"must give {name} one {what}")
        if found:
            values[name] = next(iter(found.values()))
        unused -= found.keys()
        ends.add(name.rpartition(".")[2])
    if unused:
        allowed = f"matches no layer that lora.target_modules picks; allowed: {', '.join(sorted(ends))}"
        raise InputError(f"lora.{what}_pattern", min(unused), allowed)
    return values


def _is_regex(target_modules: str | tuple[str, ...]) -> TypeGuard[str]:
    return isinstance(target_modules, str) and not re.fullmatch(r"[\w.\-]+", target_modules)


def _entries(target_modules: str | tuple[str, ...]) -> tuple[str, ...]:
    return (target_modules,) if isinstance(target_modules, str) else target_modules


def _near(entry: str, linear_names: list[str]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in linear_names})
    hint = did_you_mean(entry.rpartition(".")[2], ends, num=3, cutoff=0.4)
    if entry in (EXPERTS, ATTENTION):
        return f"this model has no {entry} that an adapter could be put on; allowed: all-linear, {', '.join(ends)}"
    return f"matches no linear layer; allowed: all-linear, {', '.join(ends)}{hint}"
