"""Find the point of a dimension that gives a value of the config, or that is nearest to a number."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from sweep.space.space import Choice, Dimension, Range

OUTSIDE = object()


def coordinate(dimension: Dimension, value: Any) -> Any:
    """Return the name or number that gives the config this value, or OUTSIDE if none does."""
    if isinstance(dimension, Choice):
        return next((name for name, given in dimension.values.items() if plain(given) == plain(value)), OUTSIDE)
    if isinstance(value, bool) or not isinstance(value, int | float) or not dimension.low <= value <= dimension.high:
        return OUTSIDE
    points = dimension.points()
    if points is None:
        return float(value)
    return next((point for point in points if abs(point - value) <= 1e-9 * max(1.0, abs(value))), OUTSIDE)


def nearest(dimension: Dimension, number: float) -> Any:
    """Return the point whose value is nearest to a number; OUTSIDE if no choice is a number.

    Nearness goes by factors where all values are above 0 and the dimension is a choice or has a log
    scale, else by differences. Of two equally near points the first is taken.
    """
    if isinstance(dimension, Range) and (points := dimension.points()) is None:
        return min(max(float(number), float(dimension.low)), float(dimension.high))
    if isinstance(dimension, Range) and isinstance(points, range):  # may be long: only the neighbours count
        place = (min(max(number, dimension.low), dimension.high) - points.start) / points.step
        points = points[max(0, math.floor(place)) : math.ceil(place) + 1]
    known = numbers(dimension) if isinstance(dimension, Choice) else {point: point for point in points}
    scale = _scale(dimension, (*known.values(), number))
    return min(known, key=lambda name: round(abs(scale(known[name]) - scale(number)), 9), default=OUTSIDE)


def numbers(choice: Choice) -> dict[Any, float]:
    """Return name -> value of the choices whose value is a number, in their order."""
    return {n: v for n, v in choice.values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _scale(dimension: Dimension, values: tuple[float, ...]) -> Callable[[float], float]:
    by_factors = isinstance(dimension, Choice) or dimension.log
    return math.log if by_factors and min(values) > 0 else float


def plain(value: Any) -> str:
    """Return text that is equal for a list and a tuple, and for 1 and 1.0."""
    return json.dumps(float(value) if isinstance(value, int) and not isinstance(value, bool) else value, default=list)
