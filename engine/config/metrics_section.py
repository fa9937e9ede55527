"""Define the metrics section of a trial's config: how answers are generated and scored. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from engine.config.parsing import ListAsTuple, PositiveInt, StrictModel, parse
from engine.errors import InputError, did_you_mean

EVAL_LOSS = "eval_loss"
GENERATED = ("exact_match", "contains", "token_f1", "rouge_l", "number_match", "json_valid", "json_equal", "regex")
"""Metrics of the project that score a generated answer. Larger is better in each, from 0 to 1."""
CHOICE = "choice_accuracy"
BUILT_IN = (*GENERATED, CHOICE)
PREFERENCE_ACCURACY = "preference_accuracy"
"""Share of pairs whose chosen answer has the higher implicit reward; measured at every rung with data.format = preference."""
LAST, EVERY, FINALISTS = "last", "every", "finalists"
OWN_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,59}")
FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
TAKEN = (EVAL_LOSS, PREFERENCE_ACCURACY, "peak_allocated_gib", "elapsed_s", "num_trainable")
"""Names of other measures, which no function of the user may have."""
NonEmpty = Annotated[str, Field(min_length=1)]
Judged = bool | NonEmpty
Rungs = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class OwnMetric(StrictModel):
    """A function of the user that scores an answer."""

    function: NonEmpty = Field(description="package.module:function")
    direction: Literal["maximize", "minimize"] = "maximize"
    batch: bool = Field(False, description="true: it takes lists of all answers and returns a list")

    @field_validator("function")
    @classmethod
    def _is_a_place(cls, value: str) -> str:
        if not FUNCTION.fullmatch(value):
            raise ValueError("must be package.module:function")
        return value


def _own_metric(field: str, value: Any) -> Any:
    """Return the metric that the value of `field` describes. Raises InputError that names this field."""
    if not isinstance(value, str):
        return parse(OwnMetric, value, field) if isinstance(value, Mapping) else value
    try:
        return parse(OwnMetric, {"function": value})
    except InputError as error:
        raise InputError(field, value, error.allowed) from None


class MetricsConfig(StrictModel):
    """What a trial's answers to evaluation samples are scored by.

    A metric is true to score against the reference answer, or names a field of the sample.
    """

    exact_match: Judged = Field(False, description="true: the answer is the reference, or the sample's field of that name")
    contains: Judged = Field(False, description="the answer contains it")
    token_f1: Judged = Field(False, description="share of words that both have (SQuAD)")
    rouge_l: Judged = Field(False, description="longest common sequence of words")
    number_match: Judged = Field(False, description="the last number of both is equal")
    json_valid: bool = Field(False, description="the answer is JSON")
    json_equal: Judged = Field(False, description="both are JSON with equal content")
    regex: NonEmpty | None = Field(None, description="pattern to find; if it has a group, that must be equal in both")
    regex_field: NonEmpty | None = Field(None, description="field that regex compares with; null: the reference answer")
    choice_accuracy: Judged = Field(False, description="the right one of the choices is the likeliest")
    choices: Annotated[NonEmpty | Annotated[tuple[NonEmpty, ...], Field(min_length=2)] | None, ListAsTuple] = Field(
        None, description="for choice_accuracy: a list of texts, or the field that has the sample's own"
    )
    own: dict[str, OwnMetric] = Field({}, description="your functions by name; also written metrics.<name>=module:function")
    max_new_tokens: Annotated[int, Field(ge=1, le=32_768)] = Field(128, description="most tokens of an answer")
    max_samples: PositiveInt = Field(128, description="evaluation samples to answer, the first by content")
    eval_set: NonEmpty | None = Field(None, description="which of several sets in data.eval is answered; null: the only one")
    batch_size: Annotated[int, Field(ge=1, le=4096)] = Field(
        32, description="answers that are generated at once; fewer if memory is short"
    )
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = Field(0.0, description="0: always the likeliest token")
    function_timeout_s: Annotated[float, Field(gt=0.0, le=3600.0)] = Field(
        30.0, description="seconds that your function may take for all answers"
    )
    at: Annotated[Literal["last", "every", "finalists"] | Rungs, ListAsTuple] = Field(
        LAST,
        description="rungs to measure at: last, every, a list of rungs; finalists: only the best adapter, at the end",
    )
    choose_by: NonEmpty = Field(
        EVAL_LOSS, description="measure whose best rung gives the adapter; a sweep takes it from sweep.objectives"
    )

    @model_validator(mode="before")
    @classmethod
    def _own_by_name(cls, values: Any) -> Any:
        """Move `my_score: package.module:function` into `own`, and refuse names that are nothing."""
        if not isinstance(values, Mapping):
            return values
        given = values.get("own") or {}
        known, own = dict(values), dict(given) if isinstance(given, Mapping) else given
        for name in [name for name in known if name not in cls.model_fields]:
            value = known.pop(name)
            if not (isinstance(value, str) and ":" in value) and not (isinstance(value, Mapping) and "function" in value):
                hint = did_you_mean(str(name), list(cls.model_fields))
                allowed = f"no such metric; known: {', '.join(BUILT_IN)}; your own is package.module:function{hint}"
                raise InputError(f"metrics.{name}", value, allowed)
            own[name] = value
        if isinstance(own, dict):
            own = {name: _own_metric(f"metrics.{name}", value) for name, value in own.items()}
        return {**known, "own": own} if own else known

    @field_validator("own")
    @classmethod
    def _names_are_new(cls, value: dict[str, OwnMetric]) -> dict[str, OwnMetric]:
        for name, metric in value.items():
            if not OWN_NAME.fullmatch(name) or name in (*cls.model_fields, *TAKEN):
                allowed = "must have a name of its own, a letter and then letters, digits and underscores"
                raise InputError(f"metrics.{name}", metric.function, allowed)
        return value

    @field_validator("regex")
    @classmethod
    def _is_a_pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"must be a regular expression ({error})") from None
        return value

    @field_validator("at")
    @classmethod
    def _rungs_ascend(cls, value: Any) -> Any:
        if not isinstance(value, str) and list(value) != sorted(set(value)):
            raise ValueError("rungs must ascend, each once")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> MetricsConfig:
        if (self.choice_accuracy is not False) != (self.choices is not None):
            raise InputError("metrics.choices", self.choices, "belongs to metrics.choice_accuracy: give both or none")
        if self.regex_field is not None and self.regex is None:
            raise InputError("metrics.regex_field", self.regex_field, "has no effect without metrics.regex")
        if self.choose_by not in (EVAL_LOSS, PREFERENCE_ACCURACY, *self.names):
            allowed = f"must be one of {', '.join((EVAL_LOSS, *self.names))}"
            raise InputError("metrics.choose_by", self.choose_by, allowed)
        if self.choose_by in self.names and self.at == FINALISTS:
            raise InputError("metrics.at", self.at, f"must be last, every or rungs: {self.choose_by} decides which trial wins")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Return the metrics that are measured, in the order of this section."""
        return (*(name for name in BUILT_IN if getattr(self, name) not in (False, None)), *self.own)

    @property
    def generates(self) -> bool:
        """Return whether a metric needs generated answers."""
        return any(name != CHOICE for name in self.names)

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the fields of samples that metrics read, each once."""
        named = [getattr(self, name) for name in BUILT_IN if name != "regex"] + [self.regex_field, self.choices]
        return tuple(dict.fromkeys(name for name in named if isinstance(name, str)))

    @property
    def needs_rows(self) -> bool:
        """Return whether a metric reads more of a sample than its prompt and reference answer."""
        return bool(self.fields or self.own)

    def field_of(self, name: str) -> str | None:
        """Return the field that a metric of the project compares with; None for the reference answer."""
        value = self.regex_field if name == "regex" else getattr(self, name)
        return value if isinstance(value, str) else None

    def is_due(self, rung: int, num_rungs: int) -> bool:
        """Return whether a trial measures at this rung. Rungs count from 1."""
        if not self.names or self.at == FINALISTS:
            return False
        if isinstance(self.at, str):
            return self.at == EVERY or rung == num_rungs
        return rung in self.at

    def num_due(self, num_rungs: int) -> int:
        """Return at how many rungs a trial measures."""
        return sum(self.is_due(rung, num_rungs) for rung in range(1, num_rungs + 1))


def sign_of(metrics: Mapping[str, Any], name: str) -> float:
    """Return 1 if smaller values of the measure are better, else -1. metrics: the section as plain data."""
    if name == EVAL_LOSS:
        return 1.0
    own = (metrics.get("own") or {}).get(name) or {}
    return 1.0 if own.get("direction") == "minimize" else -1.0
