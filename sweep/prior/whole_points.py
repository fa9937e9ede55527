"""Complete a part of a point of the space: every other active field gets a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sweep.space.coordinates import OUTSIDE, coordinate, nearest
from sweep.space.space import Choice, Dimension, Space, is_active, value_at

Params = dict[str, Any]
Prefer = Callable[[Dimension], Any]
"""Returns the point of a dimension that is tried where nothing else decides, or OUTSIDE for none."""


def no_preference(dimension: Dimension) -> Any:
    """Prefer nothing: what is missing comes from the base config."""
    return OUTSIDE


def completed(space: Space, base: Mapping[str, Any], given: Mapping[str, Any], prefer: Prefer = no_preference) -> Params:
    """Return the params of a whole point, with the given ones.

    A missing field gets what `prefer` returns, else the base config's value, else the nearest value
    that the space has, else its first one. A field with choices on which a given one depends gets a
    choice with which that one varies. A given field that does not vary at the point is left out.
    """
    params: Params = {}
    needed = _needed(space, given)
    for dimension in space.dimensions:
        if is_active(dimension, params):
            path = dimension.path
            params[path] = given[path] if path in given else _chosen(dimension, base, needed.get(path), prefer)
    return params


def _needed(space: Space, given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return path -> the choices with which all given fields that depend on it can vary.

    Fields on which these depend count as given.
    """
    needed: dict[str, list[Any]] = {}
    for dimension in reversed(space.dimensions):  # those that depend on others come first
        if dimension.path in given or dimension.path in needed:
            for path, names in dimension.when.items():
                known = needed.get(path, names)
                needed[path] = [name for name in known if name in names]
    return needed


def _chosen(dimension: Dimension, base: Mapping[str, Any], needed: list[Any] | None, prefer: Prefer) -> Any:
    value = value_at(base, dimension.path)
    found = [prefer(dimension), coordinate(dimension, value)]
    if isinstance(value, int | float) and not isinstance(value, bool):
        found.append(nearest(dimension, value))
    found.append(next(iter(dimension.values)) if isinstance(dimension, Choice) else dimension.low)
    allowed = [point for point in found if point is not OUTSIDE and (needed is None or point in needed)]
    return allowed[0] if allowed else needed[0] if needed else found[-1]
