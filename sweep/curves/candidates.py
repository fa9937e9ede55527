"""List the untried points of a space that a new trial may have.

A space of up to MOST_LISTED points is listed whole. Of a larger one, a block of points is drawn for
each new trial, and the last blocks count. The draws depend on the seed and the number of trials only,
so a resumed sweep sees the same ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from typing import Any

from sweep.space.space import Space

MOST_LISTED = 1000
NUM_BLOCKS, NUM_DRAWN = 4, 64  # of each block
Params = dict[str, Any]
_ABSENT = object()  # the value of a dimension whose condition does not hold


class Candidates:
    """Offer the points of a space that no trial has tried, in an order fixed by the seed."""

    def __init__(self, space: Space, seed: int) -> None:
        size = space.size()
        points = space.shuffled_points(seed) if size is not None and size <= MOST_LISTED else None
        self._space, self._seed = space, seed
        self._paths = [dimension.path for dimension in space.dimensions]
        self._listed = None if points is None else self._by_key(points)
        self._tried: set[tuple] = set()
        self._drawn: tuple[int, dict[tuple, Params]] = (-1, {})
        self._blocks: dict[int, dict[tuple, Params]] = {}

    def drop(self, params: Mapping[str, Any]) -> None:
        """Offer this point no more: a trial has it, or it is equal to one that a trial has."""
        key = self._key(params)
        self._tried.add(key)
        for points in (self._listed, self._drawn[1]):
            if points is not None:
                points.pop(key, None)

    def at(self, number: int) -> list[Params]:
        """Return the points that trial `number` may have."""
        if self._listed is not None:
            return list(self._listed.values())
        if self._drawn[0] != number:
            self._blocks = {block: self._block(block) for block in range(number - NUM_BLOCKS + 1, number + 1)}
            drawn = {key: point for block in self._blocks.values() for key, point in block.items()}
            self._drawn = number, {key: point for key, point in drawn.items() if key not in self._tried}
        return list(self._drawn[1].values())

    def _block(self, number: int) -> dict[tuple, Params]:
        if (known := self._blocks.get(number)) is not None:
            return known
        trial = _Draw(random.Random(f"{self._seed} {number}"))
        return self._by_key(self._space.suggest(trial) for _ in range(NUM_DRAWN))

    def _by_key(self, points: Iterable[Params]) -> dict[tuple, Params]:
        return {self._key(point): point for point in points}

    def _key(self, params: Mapping[str, Any]) -> tuple:
        return tuple([params.get(path, _ABSENT) for path in self._paths])


class _Draw:
    """Draw values with equal chances, as Optuna's random sampler does, at a hundredth of its time."""

    def __init__(self, random_numbers: random.Random) -> None:
        self._random = random_numbers

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._random.choice(choices)

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        if log:
            return min(max(round(math.exp(self._random.uniform(math.log(low - 0.5), math.log(high + 0.5)))), low), high)
        return low + step * self._random.randrange((high - low) // step + 1)

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float:
        if log:
            return min(max(math.exp(self._random.uniform(math.log(low), math.log(high))), low), high)
        if step is None:
            return self._random.uniform(low, high)
        return round(low + step * self._random.randrange(math.floor((high - low) / step + 1e-9) + 1), 12)
