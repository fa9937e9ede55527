"""Find the user's own metric, and call it in a process of its own with a time limit.

Its name comes from the user's config or command line. Its module is imported where it is looked
for, and runs with the user's rights: it is the user's code, not the data's.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config.metrics_section import OwnMetric
from engine.errors import InputError, first_line
from engine.system.limited_child import Bounded, TooCostly

LIMIT_GIB = 4.0
ARGUMENTS = "(prompt, reference, answer, sample)"


@dataclass(frozen=True)
class Answered:
    """Hold one answered sample, as a metric sees it.

    prompt, reference, answer: text. sample: the row of the data with all its columns.
    """

    prompt: str
    reference: str
    answer: str
    sample: dict[str, Any]


class OwnMetricError(Exception):
    """Report in one line why the user's function gave no score."""


def find_function(name: str, metric: OwnMetric) -> Callable[..., Any]:
    """Import the function. Raises InputError if it cannot be imported or takes other arguments."""
    module, _, function = metric.function.partition(":")
    field = f"metrics.{name}"
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        why = f"cannot be imported ({type(error).__name__}: {first_line(error)})"
        raise InputError(field, metric.function, f"{why}; modules come from PYTHONPATH and installed packages") from None
    try:
        inspect.signature(found).bind("", "", "", {})
    except (TypeError, ValueError):
        raise InputError(field, metric.function, f"must be a function that takes {ARGUMENTS}") from None
    return found


def own_scores(name: str, metric: OwnMetric, answers: Sequence[Answered], limit_s: float) -> list[float]:
    """Return the function's score of each answer. Raises OwnMetricError if it fails, or takes too long.

    limit_s: seconds for all answers together.
    """
    function = find_function(name, metric)

    def score(items: Sequence[Answered]) -> Any:
        if metric.batch:
            columns = ([getattr(one, part) for one in items] for part in ("prompt", "reference", "answer", "sample"))
            return _numbers(function(*columns), len(items))
        return [_number(function(one.prompt, one.reference, one.answer, one.sample)) for one in items]

    def guarded(items: Sequence[Answered]) -> Any:
        try:
            return score(items)
        except Exception as error:  # its own class may not be known to the caller
            raise OwnMetricError(f"{type(error).__name__}: {first_line(error)}") from None

    try:
        with Bounded(guarded, limit_s, LIMIT_GIB) as call:
            return call(list(answers))
    except (OwnMetricError, TooCostly) as error:
        raise OwnMetricError(f"metrics.{name} = {metric.function} gave no score: {first_line(error)}") from None


def _numbers(values: Any, count: int) -> list[float]:
    found = [_number(value) for value in values]
    if len(found) != count:
        raise ValueError(f"must return {count} scores, one for each answer, not {len(found)}")
    return found


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"must return a finite number, not {value!r}")
    return number
