"""Read the config's `space` section into a Space, before a trial starts.

A leaf is a mapping with `choices`, or with `low` and `high`. `choices` is a list of scalars, or a
mapping name -> value, whose names the study stores. A range may also have `log` and `step`, and
whole-number bounds give whole numbers.

`when: {other.path: name or [names]}` makes a leaf conditional. If the condition does not hold, the
field keeps its base value. Keys may be nested or dotted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from engine.config.parsing import MAX_COUNT
from engine.config.trial import TrainConfig
from engine.errors import InputError, did_you_mean
from sweep.space.space import Choice, Dimension, Range, Scalar, Space
from sweep.space.unsearchable import UNSEARCHABLE

MAX_STEPS = 1_000_000
WEIGHT = re.compile(r"data\.train\.\d{1,2}\.weight")  # of a source of a mixture
LEAF_KEYS = ("choices", "low", "high", "log", "step", "when")


def parse_space(data: Mapping[str, Any]) -> Space:
    """Check the `space` section, and return it as a Space.

    Raises InputError, which names the path and the allowed values.
    """
    leaves: dict[str, Mapping[str, Any]] = {}
    for path, leaf in _leaves(data, ""):
        if path in leaves:
            raise InputError(f"space.{path}", dict(leaf), f"is given twice, also as {dict(leaves[path])}; leave one out")
        leaves[path] = leaf
    dimensions = {path: _dimension(path, leaf) for path, leaf in leaves.items()}
    for dimension in dimensions.values():
        _check_condition(dimension, dimensions)
    return Space(tuple(_parents_first(dimensions)))


def check_weights(space: Space, base: Mapping[str, Any]) -> None:
    """Raise InputError if some trial could have a mixture in which every weight is zero. base: plain data."""
    varied = {dimension.path: dimension for dimension in space.dimensions if WEIGHT.fullmatch(dimension.path)}
    sources = base["data"]["train"]
    if not isinstance(sources, list | tuple) or not all(isinstance(one, Mapping) for one in sources):
        return
    if varied and all(_may_be_zero(varied.get(f"data.train.{i}.weight"), one["weight"]) for i, one in enumerate(sources)):
        first = next(iter(varied))
        allowed = "must be above 0 in one source at least: a trial may get a weight of zero everywhere, and so no data"
        raise InputError(f"space.{first}", 0, allowed)


def _may_be_zero(dimension: Dimension | None, weight: float) -> bool:
    if dimension is None:
        return not weight
    return dimension.holds(0) or (bool(dimension.when) and not weight)


def known_paths() -> list[str]:
    """Return every dotted path of TrainConfig."""
    sections = TrainConfig.model_fields
    return [f"{section}.{key}" for section, info in sections.items() for key in info.annotation.model_fields]


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key, value in node.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if not isinstance(value, Mapping):
            raise InputError(f"space.{path}", value, "must be a mapping with choices, or with low and high")
        if {"choices", "low", "high"} & set(value):
            yield path, value
        else:
            yield from _leaves(value, path)


def _dimension(path: str, leaf: Mapping[str, Any]) -> Dimension:
    where, known = f"space.{path}", known_paths()
    if path not in known and not WEIGHT.fullmatch(path):
        hint = did_you_mean(path, known, num=3, cutoff=0.5) or f"; allowed: {', '.join(known)}"
        raise InputError(where, dict(leaf), f"must be a field of a trial{hint}")
    if path in UNSEARCHABLE:
        raise InputError(where, dict(leaf), f"cannot be searched over: {UNSEARCHABLE[path]}")
    unknown = sorted(set(leaf) - set(LEAF_KEYS))
    if unknown:
        raise InputError(f"{where}.{unknown[0]}", leaf[unknown[0]], f"unknown key; known keys: {', '.join(LEAF_KEYS)}")
    when = _condition(where, leaf.get("when") or {})
    return _choice(path, leaf, when) if "choices" in leaf else _range(path, leaf, when)


def _choice(path: str, leaf: Mapping[str, Any], when: dict[str, tuple[Scalar, ...]]) -> Choice:
    where, choices = f"space.{path}.choices", leaf["choices"]
    extra = sorted(set(leaf) - {"choices", "when"})
    if extra:
        allowed = f"choices cannot be combined with low, high, log or step; to replace a leaf, remove it first: '~space.{path}'"
        raise InputError(f"space.{path}", dict(leaf), allowed)
    if isinstance(choices, Mapping):
        values = dict(choices)
    elif isinstance(choices, list | tuple):
        if not all(isinstance(value, Scalar) for value in choices):
            raise InputError(where, choices, "values that are not scalars need names: choices: {name: value}")
        values = {value: value for value in choices}
    else:
        raise InputError(where, choices, "must be a list of scalars, or a mapping name -> value")
    if not values or len(values) != len(choices):
        raise InputError(where, choices, "must be at least one value, and all distinct")
    return Choice(path, values, when)


def _range(path: str, leaf: Mapping[str, Any], when: dict[str, tuple[Scalar, ...]]) -> Range:
    where = f"space.{path}"
    for key in ("low", "high"):
        value = leaf.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= MAX_COUNT:
            raise InputError(f"{where}.{key}", value, f"must be a finite number, up to {MAX_COUNT:g}")
    low, high, log, step = leaf["low"], leaf["high"], leaf.get("log", False), leaf.get("step")
    if low > high:
        raise InputError(where, dict(leaf), "low must not be above high")
    if not isinstance(log, bool):
        raise InputError(f"{where}.log", log, "must be true or false")
    if log and (low <= 0 or step is not None):
        raise InputError(where, dict(leaf), "a log range needs low above 0 and takes no step")
    whole = isinstance(low, int) and isinstance(high, int)
    if step is not None and (isinstance(step, bool) or not isinstance(step, int if whole else int | float) or step <= 0):
        raise InputError(f"{where}.step", step, f"must be a positive {'whole ' if whole else ''}number")
    if step is not None and (step > MAX_COUNT or (not whole and (high - low) / step > MAX_STEPS)):
        raise InputError(f"{where}.step", step, f"must divide the range into at most {MAX_STEPS:,} steps")
    return Range(path, low, high, log, step, when)


def _condition(where: str, when: Any) -> dict[str, tuple[Scalar, ...]]:
    if not isinstance(when, Mapping):
        raise InputError(f"{where}.when", when, "must be a mapping other.path -> choice name, or list of names")
    pairs = [pair for key, value in when.items() for pair in flattened(str(key), value)]
    flat = dict(pairs)
    if len(flat) < len(pairs):
        raise InputError(f"{where}.when", dict(when), "gives a field twice; leave one of them out")
    return {path: tuple(names) if isinstance(names, list | tuple) else (names,) for path, names in flat.items()}


def flattened(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of each leaf of nested mappings."""
    if not isinstance(value, Mapping):
        yield path, value
        return
    for key, inner in value.items():
        yield from flattened(f"{path}.{key}", inner)


def _check_condition(dimension: Dimension, dimensions: Mapping[str, Dimension]) -> None:
    for path, names in dimension.when.items():
        where, parent = f"space.{dimension.path}.when.{path}", dimensions.get(path)
        if not isinstance(parent, Choice):
            choices = [other.path for other in dimensions.values() if isinstance(other, Choice)]
            raise InputError(where, list(names), f"must refer to a field with choices; those are: {', '.join(choices) or 'none'}")
        for name in names:
            if name not in parent.values:
                raise InputError(where, name, f"must be one of {parent.describe()}")


def _parents_first(dimensions: Mapping[str, Dimension]) -> list[Dimension]:
    ordered: dict[str, Dimension] = {}
    while len(ordered) < len(dimensions):
        ready = [d for path, d in dimensions.items() if path not in ordered and all(p in ordered for p in d.when)]
        if not ready:
            cycle = sorted(set(dimensions) - set(ordered))
            raise InputError("space", cycle, "must not have conditions that refer to each other in a circle")
        ordered.update((d.path, d) for d in ready)
    return list(ordered.values())
