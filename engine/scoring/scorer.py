"""Score all answers by all metrics of a config, and take their means."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.config.metrics_section import CHOICE, MetricsConfig
from engine.errors import first_line
from engine.scoring.own_function import Answered, OwnMetricError, own_scores
from engine.scoring.text_metrics import contains, exact_match, regex_match, rouge_l, token_f1
from engine.scoring.value_metrics import json_equal, json_valid, number_match
from engine.system.limited_child import Bounded, TooCostly

COMPARED = {
    "exact_match": exact_match, "contains": contains, "token_f1": token_f1, "rouge_l": rouge_l,
    "number_match": number_match, "json_equal": json_equal,
}  # fmt: skip
MISSING = object()


@dataclass(frozen=True)
class Scores:
    """Hold the scores of one adapter.

    by_sample: metric -> score of each sample [N]. errors: metric -> one line that says why it has none.
    """

    by_sample: Mapping[str, Sequence[float]]
    errors: Mapping[str, str] = field(default_factory=dict)

    @property
    def means(self) -> dict[str, float]:
        """Return the mean score of each metric that has one."""
        return {name: math.fsum(scores) / len(scores) for name, scores in self.by_sample.items() if len(scores)}


def field_value(sample: Mapping[str, Any], name: str) -> Any:
    """Return a field of the sample, or MISSING. A name with dots leads into objects, if no column has it whole."""
    if name in sample:
        return sample[name]
    value: Any = sample
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return MISSING
        value = value[part]
    return value


def as_text(value: Any) -> str:
    """Return text as it is, and anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def score_answers(config: MetricsConfig, answers: Sequence[Answered]) -> Scores:
    """Score generated answers by every metric but choice_accuracy. No metric's error ends the others."""
    found: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    for name in config.names:
        try:
            if name in config.own:
                found[name] = own_scores(name, config.own[name], answers, config.function_timeout_s)
            elif name != CHOICE:
                found[name] = _scores(config, name, answers)
        except (OwnMetricError, TooCostly) as error:
            errors[name] = first_line(error)
        except Exception as error:  # such as InputError, if the user's module is gone by now
            errors[name] = f"metrics.{name} gave no score: {type(error).__name__}: {first_line(error)}"
    return Scores(found, errors)


def _scores(config: MetricsConfig, name: str, answers: Sequence[Answered]) -> list[float]:
    if name == "json_valid":
        return [json_valid(one.answer) for one in answers]
    pairs = [(one.answer, _reference(config, name, one)) for one in answers]
    if name != "regex":
        return [COMPARED[name](*pair) for pair in pairs]
    # a pattern can take forever on an answer that nobody foresaw
    with Bounded(lambda items: [regex_match(*pair, config.regex) for pair in items], config.function_timeout_s) as call:
        try:
            return call(pairs)
        except TooCostly as error:
            raise TooCostly(f"metrics.regex = {config.regex!r} gave no score: it {error}") from None


def _reference(config: MetricsConfig, name: str, one: Answered) -> str:
    wanted = config.field_of(name)
    return one.reference if wanted is None else as_text(field_value(one.sample, wanted))
