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
from engine.scoring.value_metrics import json_equal, json_valid, last_number, number_match
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
    pairs = [(one.answer, references(config, name, one.reference, one.sample)) for one in answers]
    if name != "regex":
        return [max(COMPARED[name](answer, wanted) for wanted in several) for answer, several in pairs]

    def best(items: Sequence[tuple[str, list[str]]]) -> list[float]:
        return [max(regex_match(answer, wanted, config.regex) for wanted in several) for answer, several in items]

    # a pattern can take forever on an answer that nobody foresaw
    with Bounded(best, config.function_timeout_s) as call:
        try:
            return call(pairs)
        except TooCostly as error:
            raise TooCostly(f"metrics.regex = {config.regex!r} gave no score: it {error}") from None


def references(config: MetricsConfig, name: str, reference: str, sample: Mapping[str, Any]) -> list[str]:
    """Return what a metric of the project compares an answer with; the best of several counts, as in SQuAD.

    They are several if its field of the sample is a list; of json_equal a list is one value. Empty where
    the field has nothing to compare with: null, an empty list, or an object.
    """
    wanted = config.field_of(name)
    if wanted is None:
        return [reference]
    value = field_value(sample, wanted)
    if name == "json_equal":
        return [as_text(value)]
    values = value if isinstance(value, list) else [value]
    return [] if any(one is None or isinstance(one, Mapping) for one in values) else [as_text(one) for one in values]


def unusable(name: str, texts: Sequence[str]) -> str | None:
    """Return why a metric gives every answer 0, whatever it is, or None. texts: all references of all samples."""
    if name == "number_match" and all(last_number(text) is None for text in texts):
        return "finds no number in any reference"
    if name == "json_equal" and not any(json_valid(text) for text in texts):
        return "finds no JSON in any reference"
    return None
