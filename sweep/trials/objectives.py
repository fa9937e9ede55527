"""Define the objectives that a study minimises, and find the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from engine.config.metrics_section import EVAL_LOSS
from sweep.trials.record import Outcome, TrialRecord

MEASURES: dict[str, Callable[[TrialRecord], float | None]] = {
    EVAL_LOSS: lambda record: record.eval_loss,
    "peak_allocated_gib": lambda record: record.peak_allocated_gib,
    "elapsed_s": lambda record: record.reports[-1].elapsed_s if record.reports else None,
    "num_trainable": lambda record: record.reports[-1].num_trainable if record.reports else None,
}
"""Objectives by name. Smaller is better. elapsed_s: seconds in optimizer steps, not evaluation."""


def measured(record: TrialRecord, name: str) -> float | None:
    """Return an objective of a trial so that smaller is better, or None. name: one of MEASURES, or a task metric."""
    return MEASURES[name](record) if name in MEASURES else record.cost(name)


def objective_values(record: TrialRecord, names: tuple[str, ...]) -> tuple[float, ...] | None:
    """Return one number for each name, or None if one was not measured or is not finite."""
    values = tuple(measured(record, name) for name in names)
    return None if any(value is None or not math.isfinite(value) for value in values) else values


def pareto_front(records: Iterable[TrialRecord], names: tuple[str, ...]) -> list[TrialRecord]:
    """Return the sweep's COMPLETE trials that no other one dominates, sorted by first objective.

    A trial dominates another if it is nowhere worse and somewhere better. A stopped trial does not
    count: it has spent less time and memory only because it was stopped. Nor does one above its limits.
    """
    measured = [(objective_values(record, names), record) for record in records if record.outcome is Outcome.COMPLETE]
    points = [
        (values, record) for values, record in measured if values is not None and record.source is None and record.keeps_limits
    ]
    front = [(values, record) for values, record in points if not any(_dominates(other, values) for other, _ in points)]
    return [record for _, record in sorted(front, key=lambda point: (point[0], point[1].number))]


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
