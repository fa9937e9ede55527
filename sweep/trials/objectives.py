"""What a study minimises, and which trials no other one beats in all of it. Plain data in, plain data out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from sweep.trials.record import Outcome, TrialRecord

EVAL_LOSS = "eval_loss"
MEASURES: dict[str, Callable[[TrialRecord], float | None]] = {
    EVAL_LOSS: lambda record: record.score,
    "peak_allocated_gib": lambda record: record.peak_allocated_gib,
    "elapsed_s": lambda record: record.reports[-1].elapsed_s if record.reports else None,
    "num_trainable": lambda record: record.reports[-1].num_trainable if record.reports else None,
}
"""By name; all are better the smaller. elapsed_s is the time inside optimizer steps, evaluation left out."""


def objective_values(record: TrialRecord, names: tuple[str, ...]) -> tuple[float, ...] | None:
    """One number for each name; None where one was not measured, or is not finite."""
    values = tuple(MEASURES[name](record) for name in names)
    return None if any(value is None or not math.isfinite(value) for value in values) else values


def pareto_front(records: Iterable[TrialRecord], names: tuple[str, ...]) -> list[TrialRecord]:
    """The sweep's COMPLETE trials that no other one equals or beats everywhere and beats somewhere, by their first objective.

    A trial that was stopped has spent less time and memory only because it was stopped.
    """
    measured = [(objective_values(record, names), record) for record in records if record.outcome is Outcome.COMPLETE]
    points = [(values, record) for values, record in measured if values is not None and record.source is None]
    front = [(values, record) for values, record in points if not any(_dominates(other, values) for other, _ in points)]
    return [record for _, record in sorted(front, key=lambda point: (point[0], point[1].number))]


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
