"""Play a sweep on a simulated clock: slots train recorded trials from rung to rung.

The unit of cost is one full trial's tokens. A slot trains one full trial in one unit of time, give
or take `SPREAD`: workers that never differ would report in lockstep. Cost counts tokens, whatever
the time that they took. Setting up a trial may cost something too, as if it were tokens.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .points import Task

SPREAD = 0.1  # a trial's speed is drawn from 1 - SPREAD to 1 + SPREAD
ROUNDING = 1e-9  # full trials: sums of tokens in another order


@dataclass(frozen=True)
class Turn:
    """Say what a slot trains next: a trial's recorded config up to a rung, counted from 1."""

    number: int
    point: int
    rung: int


@dataclass(frozen=True)
class Choice:
    """Name the adapter that a strategy would hand out: a recorded config at a rung."""

    point: int
    rung: int


class Side(Protocol):
    """Decide as a strategy does. The clock asks, and tells it of reports in their order."""

    def next_trial(self) -> Turn | None:
        """Return what a free slot trains, or None until something has been reported."""

    def reported(self, turn: Turn, eval_loss: float) -> bool:
        """Take a report in nats; return whether the trial goes on to its next rung now."""

    def diverged(self, turn: Turn) -> None:
        """Take note that the trial ended before this rung, without a loss."""

    def chosen(self) -> Choice | None:
        """Return the adapter that the strategy would hand out now, or None if it has none."""


@dataclass(order=True)
class _Running:
    ends: float
    number: int
    turn: Turn
    speed: float


class Clock:
    """Run one replay. `now` is the time in full trials of one slot."""

    def __init__(
        self, task: Task, seeds: Sequence[int], num_slots: int, seed: int, setup: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        """seeds: which recorded curve each point of the task shows in this replay.

        setup: full trials that it costs to begin a trial, and to go on with one that left its slot.
        """
        self.now, self.cost = 0.0, 0.0
        self._task, self._num_slots, self._seed = task, num_slots, seed
        self._losses = [point.curves[seeds[i]] for i, point in enumerate(task.points)]
        self._ways = [after - before for before, after in zip((0, *task.grid), task.grid)]
        self._running: list[_Running] = []
        self._setup = setup

    def run(self, side: Side, costs: Sequence[float]) -> list[Choice | None]:
        """Play until the highest cost; return what the side would hand out at each, ascending."""
        chosen: list[Choice | None] = []
        self._fill(side)
        while self._running and len(chosen) < len(costs):
            ends = self._running[0].ends
            cost = self.cost + (ends - self.now) * sum(one.speed for one in self._running)
            while len(chosen) < len(costs) and cost > costs[len(chosen)] + ROUNDING:
                chosen.append(side.chosen())
            self.now, self.cost = ends, cost
            if len(chosen) < len(costs):
                self._turn_ended(side)
        return chosen + [side.chosen()] * (len(costs) - len(chosen))

    def _fill(self, side: Side) -> None:
        while len(self._running) < self._num_slots and (turn := side.next_trial()) is not None:
            self._start(turn, self._setup[turn.rung > 1])

    def _start(self, turn: Turn, setup: float = 0.0) -> None:
        speed = 1.0 + SPREAD * random.Random(f"{self._seed} {turn.number}").uniform(-1.0, 1.0)
        way = self._ways[turn.rung - 1] / self._task.grid[-1] + setup
        heapq.heappush(self._running, _Running(self.now + way / speed, turn.number, turn, speed))

    def _turn_ended(self, side: Side) -> None:
        turn = heapq.heappop(self._running).turn
        losses = self._losses[turn.point]
        if turn.rung > len(losses) or not math.isfinite(losses[turn.rung - 1]):
            side.diverged(turn)
        elif side.reported(turn, losses[turn.rung - 1]):
            self._start(Turn(turn.number, turn.point, turn.rung + 1))
        self._fill(side)


MakeSide = Callable[[Task, int, int, float, Callable[[], float]], Side]
"""A side's maker takes task, seed, num_slots, the cost at which the sweep ends, and the clock."""
