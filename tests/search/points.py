"""Hold the recorded curves of one task: the finite list of configs that a replay may train.

A strategy proposes any point of the space. `Task.nearest` says which recorded config that trains:
the one at the least Euclidean distance. `WEIGHTS` says how far apart two values of an axis are. The
rate weighs most, since it changes the loss most.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy

from sweep.space.parse import parse_space
from sweep.space.space import Scalar, Space

RATE = "optim.learning_rate"  # always a range, as in the committed spaces
LOG_AXES = (RATE, "lora.rank", "data.max_seq_length")
WEIGHTS = {RATE: 6.0, "lora.rank": 1.25, "lora.target_modules": 1.0, "lora.lora_alpha": 0.7, "data.max_seq_length": 0.8,
           "lora.lora_dropout": 0.3}  # fmt: skip
"""Distance between the lowest and the highest value of an axis, or between two names; others: 1."""


@dataclass(frozen=True)
class Point:
    """Record one config.

    params: dotted path -> value or choice name. curves: one for each seed; each has the eval_loss
    in nats at rungs 1, 2, ..., and fewer than the task's rungs if the trial diverged.
    num_trainable: the adapter's parameters. settings: section -> fields of its config that no axis
    names, such as the alpha that a convention gave.
    """

    params: Mapping[str, Scalar]
    curves: tuple[tuple[float, ...], ...]
    num_trainable: int = 0
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def score(self, seed: int) -> float:
        """Return the lowest loss of the curve in nats, or infinity."""
        return min(self.curves[seed], default=math.inf)


@dataclass(frozen=True)
class Task:
    """Hold the configs of one task, which were all trained on the same tokens and rungs.

    grid: tokens seen at each rung; the last is a full trial's. names: axis -> choice name -> what
    the config gets, for choices that are no scalars. fixed: section -> values of every trial.
    design: the points that span the axes, if `points` are a part of them. configs: those of the
    points, once they have been made.
    """

    name: str
    grid: tuple[int, ...]
    points: tuple[Point, ...]
    names: Mapping[str, Mapping[Scalar, Any]] = field(default_factory=dict)
    fixed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    design: tuple[Point, ...] = ()
    configs: dict[tuple, Any] = field(default_factory=dict, compare=False)

    def part(self, keep: float, seed: int) -> Task:
        """Return the task with a share of its points, drawn by the seed. The space stays the same."""
        count = max(1, round(keep * len(self.points)))
        drawn = sorted(random.Random(f"part {seed}").sample(range(len(self.points)), count))
        return replace(self, points=tuple(self.points[i] for i in drawn), design=self.design or self.points)

    @cached_property
    def axes(self) -> dict[str, list[Scalar]]:
        """Return path -> its recorded values, without those that never vary, ascending."""
        design = self.design or self.points
        values = {path: list(dict.fromkeys(point.params[path] for point in design)) for path in design[0].params}
        return {path: sorted(found, key=_order) for path, found in values.items() if len(found) > 1}

    @cached_property
    def space_section(self) -> dict[str, Any]:
        """Return the `space` section of a sweep over the axes."""
        return {path: self._leaf(path, values) for path, values in self.axes.items()}

    @cached_property
    def space(self) -> Space:
        return parse_space(self.space_section)

    @cached_property
    def places(self) -> numpy.ndarray:
        """Return [number of points, number of coordinates]: where each point lies."""
        return numpy.array([self._place(point.params) for point in self.points])

    def nearest(self, params: Mapping[str, Any], used: Sequence[bool] | None = None) -> int:
        """Return the index of the recorded config nearest to a point of the space.

        used: leave out the points marked here. Raises ValueError if that leaves none.
        """
        key = json.dumps(params, sort_keys=True)
        if used is None and key in self._known:
            return self._known[key]
        away = ((self.places - self._place(params)) ** 2).sum(1)
        if used is not None:
            away = numpy.where(used, math.inf, away)
        index = int(away.argmin())
        if math.isinf(away[index]):
            raise ValueError("every recorded config is used")
        if used is None:
            self._known[key] = index
        return index

    @cached_property
    def _known(self) -> dict[str, int]:
        return {}

    def _leaf(self, path: str, values: list[Scalar]) -> dict[str, Any]:
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            known = self.names.get(path)
            return {"choices": {name: known[name] for name in values} if known else values}
        return {"low": values[0], "high": values[-1], "log": True} if path == RATE else {"choices": values}

    def _place(self, params: Mapping[str, Any]) -> list[float]:
        place: list[float] = []
        for path, values in self.axes.items():
            weight = WEIGHTS.get(path, 1.0)
            if isinstance(values[0], str | bool) or values[0] is None:
                # two names differ in two coordinates
                place += [weight * math.sqrt(0.5) * (params[path] == value) for value in values]
            else:
                scale = math.log if path in LOG_AXES else float
                low, high = scale(values[0]), scale(values[-1])
                place.append(weight * (scale(params[path]) - low) / (high - low))
        return place


def _order(value: Scalar) -> tuple[bool, Any]:
    return (isinstance(value, str), value)
