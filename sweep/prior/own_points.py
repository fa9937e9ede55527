"""Read the user's own points, `sweep.first_trials`, and refuse what is no point of the space."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import InputError, did_you_mean
from sweep.prior.whole_points import Params, completed
from sweep.space.coordinates import OUTSIDE, coordinate
from sweep.space.parse import flattened
from sweep.space.space import Choice, Dimension, Space


def read_own_points(first_trials: Sequence[Mapping[str, Any]], space: Space, base: Mapping[str, Any]) -> list[Params]:
    """Return the points as params: dotted path -> number or choice name. They may lack fields.

    A field with choices takes a choice's name or its value. Keys may be nested or dotted. base: the
    base config as plain data. Raises InputError for a field that does not vary, or has a value that
    no trial has; for fields that no trial has together; for a config that is not valid; and for a
    point that is given twice.
    """
    points: dict[str, Params] = {}
    for number, given in enumerate(first_trials, 1):
        point = _read(number, given, space)
        _check_whole(number, given, point, space, base)
        key = json.dumps(point, sort_keys=True)
        if key in points:
            raise _error(number, given, f"is point {list(points).index(key) + 1} once more; leave one of them out")
        points[key] = point
    return list(points.values())


def _read(number: int, given: Mapping[str, Any], space: Space) -> Params:
    known = {dimension.path: dimension for dimension in space.dimensions}
    point: Params = {}
    for path, value in (leaf for key, inner in given.items() for leaf in flattened(str(key), inner)):
        if path not in known:
            varied = f"the space varies {', '.join(known) or 'nothing'}"
            raise _error(number, given, f"{path} is not varied; {varied}{did_you_mean(path, known)}")
        if path in point:
            raise _error(number, given, f"{path} is given twice")
        point[path] = _point(known[path], value)
        if point[path] is OUTSIDE:
            raise _error(number, given, f"{path} = {value!r} is outside the space: {known[path].describe()}")
    for path in point:
        _check_condition(number, given, known[path], point)
    return point


def _point(dimension: Dimension, value: Any) -> Any:
    """Return the choice of that name, else the point that gives that value; OUTSIDE if there is neither."""
    if isinstance(dimension, Choice):
        for name in dimension.values:
            if name == value and isinstance(name, bool) == isinstance(value, bool):
                return name
    return coordinate(dimension, value)


def _check_condition(number: int, given: Mapping[str, Any], dimension: Dimension, point: Params) -> None:
    for path, names in dimension.when.items():
        if path in point and point[path] not in names:
            allowed = f"{dimension.path} varies only if {path} is {' or '.join(map(str, names))}, and here it is {point[path]}"
            raise _error(number, given, allowed)


def _check_whole(number: int, given: Mapping[str, Any], point: Params, space: Space, base: Mapping[str, Any]) -> None:
    """Raise InputError if a given field does not vary at the whole point, or if that is not valid."""
    whole = completed(space, base, point)
    if lost := [path for path in point if path not in whole]:
        others = ", ".join(path for path in point if path != lost[0])
        raise _error(number, given, f"no trial varies {lost[0]} together with {others}")
    try:
        space.apply(base, whole)
    except InputError as error:
        raise _error(number, given, f"not valid in a trial: {error}") from None


def _error(number: int, given: Mapping[str, Any], allowed: str) -> InputError:
    return InputError("sweep.first_trials", dict(given), f"point {number}: {allowed}")
