"""Define the search space: which fields of TrainConfig vary, over what, and under which condition.

A sampler proposes `params`, a mapping path -> number or choice name. `Space.apply` turns them into
a TrainConfig. sweep/space/parse.py reads a Space from the config's `space` section.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.errors import InputError

Scalar = str | int | float | bool | None
MAX_WALKED_POINTS = 100_000  # to shuffle a list of this many points takes under a second


class Suggester(Protocol):
    """Declare the methods of an Optuna trial that suggest() calls."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int: ...
    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float: ...


@dataclass(frozen=True)
class Choice:
    """Vary a field over named values.

    values: the name that the study stores -> the value that the field gets.
    """

    path: str
    values: dict[Scalar, Any]
    when: dict[str, tuple[Scalar, ...]] = field(default_factory=dict)

    def suggest(self, trial: Suggester) -> Scalar:
        return trial.suggest_categorical(self.path, list(self.values))

    def points(self) -> list[Scalar]:
        return list(self.values)

    corners = points

    def value(self, name: Any) -> Any:
        """Return the config's value for a choice's name."""
        return self.values[name]

    def holds(self, value: Any) -> bool:
        """Return whether some trial can have this value."""
        return value in self.values.values()

    def describe(self) -> str:
        return ", ".join(str(name) for name in self.values)


@dataclass(frozen=True)
class Range:
    """Vary a numeric field from low to high, both included."""

    path: str
    low: float
    high: float
    log: bool = False
    step: float | None = None
    when: dict[str, tuple[Scalar, ...]] = field(default_factory=dict)

    @property
    def is_int(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def suggest(self, trial: Suggester) -> float:
        if self.is_int:
            return trial.suggest_int(self.path, self.low, self.high, step=self.step or 1, log=self.log)
        return trial.suggest_float(self.path, float(self.low), float(self.high), step=self.step, log=self.log)

    def points(self) -> Sequence[float] | None:
        """Return all values, or None if the range is continuous."""
        if self.is_int:
            return range(self.low, self.high + 1, self.step or 1)
        if self.step is None:
            return None
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return [round(self.low + i * self.step, 12) for i in range(count)]

    def value(self, number: Any) -> Any:
        """Return the config's value for a number of the range, which is that number."""
        return number

    def holds(self, value: Any) -> bool:
        """Return whether the value is a number in the range."""
        return isinstance(value, int | float) and self.low <= value <= self.high

    def corners(self) -> list[float]:
        return [self.low, self.high]

    def describe(self) -> str:
        step = f", step {self.step:g}" if self.step else ""
        return f"{self.low:g} .. {self.high:g}{', log' if self.log else ''}{step}"


Dimension = Choice | Range


@dataclass(frozen=True)
class Space:
    """Hold the dimensions, each after those that its condition refers to."""

    dimensions: tuple[Dimension, ...]

    def suggest(self, trial: Suggester) -> dict[str, Any]:
        """Ask the trial for every active dimension in turn (define-by-run).

        Returns path -> value or choice name.
        """
        params: dict[str, Any] = {}
        for dimension in self.dimensions:
            if is_active(dimension, params):
                params[dimension.path] = dimension.suggest(trial)
        return params

    def apply(self, base: Mapping[str, Any], params: Mapping[str, Any]) -> TrainConfig:
        """Return the base config (plain data) with the sampled values applied.

        Raises InputError if the result is not valid.
        """
        return parse(TrainConfig, self.merged(base, params))

    def merged(self, base: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the base config with the sampled values as plain data, without a check: enough for the record of a trial.

        Sections that the space leaves alone are the base's own objects, since there may be thousands of records.
        """
        config = dict(base)
        for dimension in self.dimensions:
            if dimension.path in params:
                section, key, *rest = dimension.path.split(".")
                if config[section] is base[section]:
                    config[section] = dict(base[section])
                value = dimension.value(params[dimension.path])
                config[section][key] = _with_weight(config[section][key], dimension.path, value) if rest else value
        return config

    def size(self) -> int | None:
        """Return the number of distinct points, or None if a dimension is continuous."""
        return _count(self.dimensions, {})

    def points(self) -> Iterator[dict[str, Any]]:
        """Yield every point. Only a space whose size() is a number has this."""
        return _points(self.dimensions, {})

    def shuffled_points(self, seed: int) -> list[dict[str, Any]] | None:
        """Return every point in an order fixed by seed.

        Returns None if the space is continuous or has more than MAX_WALKED_POINTS points.
        """
        if not self._is_walkable():
            return None
        points = list(self.points())
        random.Random(seed).shuffle(points)
        return points

    def check_walkable(self) -> None:
        """Raise InputError if the space cannot be enumerated, which grid search needs."""
        if not self._is_walkable():
            paths = [dimension.path for dimension in self.dimensions if dimension.points() is None]
            reason = f"give choices or a step for {', '.join(paths)}" if paths else f"this one has {self.size():,}"
            allowed = f"needs a space of at most {MAX_WALKED_POINTS:,} points: {reason}"
            raise InputError("sampler.name", "grid", allowed)

    def _is_walkable(self) -> bool:
        size = self.size()
        return size is not None and size <= MAX_WALKED_POINTS

    def single_changes(self, base: Mapping[str, Any]) -> list[TrainConfig]:
        """Return the base config, and one config for each choice and each end of a range.

        All other fields are as in base, except those that the changed field's condition needs. A
        field that every trial varies has its first value where no trial has the base's. Raises
        InputError at the first config that is not valid.
        """
        always = [dimension for dimension in self.dimensions if not dimension.when]
        reached = {d.path: d.corners()[0] for d in always if not d.holds(value_at(base, d.path))}
        configs = [self.apply(base, reached)]
        for dimension in self.dimensions:
            for value in dimension.corners():
                params = {**reached, **_parents(dimension, {d.path: d for d in self.dimensions}), dimension.path: value}
                try:
                    configs.append(self.apply(base, params))
                except InputError as error:
                    raise InputError(f"space.{dimension.path}", value, f"not valid in a trial: {error}") from None
        return list({config.fingerprint(): config for config in configs}.values())

    def check_pairs(self, base: Mapping[str, Any]) -> None:
        """Raise InputError if two values, each valid by itself, are not valid together: a sampler may draw both."""
        for one, other in itertools.combinations(self.dimensions, 2):
            for params in self._pairs(base, one, other):
                try:
                    self.apply(base, params)
                except InputError as error:
                    with_value = f"not valid with {one.path} = {params[one.path]}"
                    allowed = f"{with_value}: {error}; leave one out, or give one a condition with `when`"
                    raise InputError(f"space.{other.path}", params[other.path], allowed) from None

    def pair_changes(self, base: Mapping[str, Any], tying: Container[str], tied: Container[str]) -> list[TrainConfig]:
        """Return the configs in which a field of `tying` and one of `tied` have values of theirs, as `single_changes` has one."""
        both = itertools.permutations(self.dimensions, 2)
        chosen = [(one, other) for one, other in both if one.path in tying and other.path in tied]
        configs = [self.apply(base, params) for one, other in chosen for params in self._pairs(base, one, other)]
        return list({config.fingerprint(): config for config in configs}.values())

    def _pairs(self, base: Mapping[str, Any], one: Dimension, other: Dimension) -> Iterator[dict[str, Any]]:
        """Yield what sets both dimensions to a choice or an end of each, where a trial can have both."""
        known = {dimension.path: dimension for dimension in self.dimensions}
        first = {d.path: d.corners()[0] for d in self.dimensions if not d.when and not d.holds(value_at(base, d.path))}
        parents = {**first, **_parents(one, known), **_parents(other, known)}
        for value, second in itertools.product(one.corners(), other.corners()):
            params = {**parents, one.path: value, other.path: second}
            if is_active(one, params) and is_active(other, params):
                yield params


def is_active(dimension: Dimension, params: Mapping[str, Any]) -> bool:
    """Return whether the dimension's condition holds for the values sampled so far."""
    return all(path in params and params[path] in names for path, names in dimension.when.items())


def value_at(config: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path of plain data, whose lists count from 0; None if there is none."""
    value: Any = config
    for part in path.split("."):
        if isinstance(value, list | tuple):
            value = value[int(part)] if part.isdigit() and int(part) < len(value) else None
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _with_weight(sources: Any, path: str, weight: Any) -> list[Any]:
    """Return the sources of a mixture with another weight at a path such as data.train.0.weight."""
    number = int(path.split(".")[2])
    several = sources if isinstance(sources, list | tuple) and all(isinstance(one, Mapping) for one in sources) else ()
    if number >= len(several):
        mixed = f"mixes {len(several)}" if several else "mixes none, as [{path: a.jsonl}, {path: b.jsonl}] would"
        allowed = f"must be the place of a source, counted from 0, and data.train {mixed}"
        raise InputError(f"space.{path}", weight, allowed)
    return [{**one, "weight": weight} if i == number else one for i, one in enumerate(several)]


def _parents(dimension: Dimension, dimensions: Mapping[str, Dimension]) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for path, names in dimension.when.items():
        params |= _parents(dimensions[path], dimensions) | {path: names[0]}
    return params


def _count(dimensions: tuple[Dimension, ...], params: dict[str, Any]) -> int | None:
    if not dimensions:
        return 1
    first, rest = dimensions[0], dimensions[1:]
    if not is_active(first, params):
        return _count(rest, params)
    points = first.points()
    if points is None:
        return None
    if any(first.path in d.when for d in rest):
        counts = [_count(rest, {**params, first.path: value}) for value in points]
        return None if None in counts else sum(counts)
    remaining = _count(rest, params)
    return None if remaining is None else len(points) * remaining


def _points(dimensions: tuple[Dimension, ...], params: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if not dimensions:
        yield dict(params)
        return
    first, rest = dimensions[0], dimensions[1:]
    if not is_active(first, params):
        yield from _points(rest, params)
        return
    for value in first.points():
        yield from _points(rest, {**params, first.path: value})
