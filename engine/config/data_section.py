"""Define the data section of a trial's config: the samples, and how they become rows. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from engine.config.data_sources import (
    OPTIONS,
    EvalLimit,
    EvalSources,
    MixedSource,
    NonEmpty,
    SourceConfig,
    TrainSources,
    Weight,
    refuse_repeats,
)  # fmt: skip
from engine.config.parsing import ListAsTuple, PositiveInt, StrictModel
from engine.errors import InputError

ON_TRAINING_SAMPLES = "train"  # value of data.eval
MAX_SEQ_LENGTH = 2**30  # positions in a row are 32-bit numbers
SeqLength = Annotated[int, Field(ge=8, le=MAX_SEQ_LENGTH)]
Column = Literal[
    "messages", "prompt", "completion", "instruction", "input", "output", "text", "system", "history", "tools", "label", "chosen",
    "rejected",
]


class DataConfig(StrictModel):
    """The training samples, and the fixed evaluation sets that all trials share."""

    train: TrainSources = Field(
        description="file, folder, pattern (*.jsonl) or list of them; hub id; builtin:<name>; or sources to mix by weights of "
        "their tokens: [{path: a.jsonl, weight: 3}, {path: b.jsonl}]"
    )
    train_split: NonEmpty = Field("train", description="of a hub data set or a folder")
    train_name: NonEmpty | None = Field(None, description="configuration of a hub data set or a folder")
    train_revision: NonEmpty | None = Field(None, description="revision of a hub data set")
    train_files: Annotated[tuple[NonEmpty, ...] | None, ListAsTuple] = Field(None, description="files of a hub data set")
    train_max_samples: PositiveInt | None = Field(None, description="number of rows, chosen by content; none: all")
    eval: EvalSources | None = Field(
        None,
        description="a source as for train; none: hold out eval_fraction of train; train: the training samples themselves; or "
        "several of these by name: {support: a.jsonl, general: b.jsonl}",
    )
    eval_weights: dict[NonEmpty, Weight] | None = Field(
        None, description="eval_loss is the mean of the sets' losses with these weights, {support: 1}; none: all weigh the same"
    )
    eval_limits: dict[NonEmpty, EvalLimit] = Field(
        {}, description="what the winner must keep to: {general: {above_base: 0.02}} or {general: {at_most: 2.1}}, in nats"
    )
    eval_split: NonEmpty = "train"
    eval_name: NonEmpty | None = Field(None, description="as train_name; none: train's, if both have one source")
    eval_revision: NonEmpty | None = Field(None, description="as train_revision; none: train's, if both have one source")
    eval_files: Annotated[tuple[NonEmpty, ...] | None, ListAsTuple] = None
    eval_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    eval_max_samples: PositiveInt = Field(256, description="number of rows, chosen by content")
    eval_max_seq_length: SeqLength = 2048
    format: Literal["auto", "messages", "prompt_completion", "text", "alpaca", "preference"] = Field(
        "auto", description="preference: pairs of chosen and rejected answers (section preference); auto: another one, by columns"
    )
    columns: dict[Column, NonEmpty] = Field({}, description="your names of columns, such as {messages: dialog}")
    bad_rows: Literal["error", "skip"] = Field("error", description="skip: leave out and count rows that cannot be read")
    overlong: Literal["cut", "drop", "split", "error"] = Field(
        "cut", description="samples beyond the length: cut them, drop them, split them into pieces, or refuse them"
    )
    chat_template: str | None = Field(None, description="none: the tokenizer's own; chatml; or a .jinja file")
    template_kwargs: dict[NonEmpty, str | bool | int | float] | None = Field(
        None, description="variables of the chat template, such as {enable_thinking: false}"
    )
    date: str | None = Field(None, description="the day that a chat template prints, YYYY-MM-DD; none: the day of the sweep")
    turns: Literal["all", "last"] = Field("all", description="last: only the last answer of a dialogue carries loss")
    max_seq_length: SeqLength = 2048
    packing: bool = True

    @model_validator(mode="after")
    def _sources_fit_together(self) -> DataConfig:
        for field, several in (("train", self.mixture), ("eval", self.eval_sets)):
            for option in OPTIONS if several else ():
                value, default = getattr(self, f"{field}_{option}"), type(self).model_fields[f"{field}_{option}"].default
                if value != default:
                    way_out = f"belongs to each of several sources: {{path: ..., {option}: ...}}"
                    raise InputError(f"data.{field}_{option}", value, way_out)
        refuse_repeats("data.train", {str(i): source for i, source in enumerate(self.mixture)})
        refuse_repeats("data.eval", self.eval_sets)
        if self.mixture and not any(source.weight for source in self.mixture):
            raise InputError("data.train", [source.weight for source in self.mixture], "must have a weight above 0")
        for field, names in (("eval_weights", self.eval_weights or ()), ("eval_limits", self.eval_limits)):
            for name in names:
                if name not in self.eval_sets:
                    known = ", ".join(self.eval_sets) or "none: write data.eval as {name: source}"
                    raise InputError(f"data.{field}", name, f"must be the name of an evaluation set; there are {known}")
        if self.eval_weights is not None and not any(self.eval_weights.values()):
            raise InputError("data.eval_weights", self.eval_weights, "must have a weight above 0, else nothing decides")
        return self

    @property
    def mixture(self) -> tuple[MixedSource, ...]:
        """Return the sources to mix; empty if data.train is one source."""
        return tuple(source for source in self.train if isinstance(source, MixedSource))

    @property
    def eval_sets(self) -> Mapping[str, SourceConfig | None]:
        """Return the evaluation sets by name, sorted; empty if data.eval is one source. None: the held-out part."""
        return self.eval if isinstance(self.eval, dict) else {}

    @property
    def set_weights(self) -> dict[str, float]:
        """Return the weight of each evaluation set in eval_loss; a set without one is only reported."""
        given = self.eval_weights
        return {name: 1.0 if given is None else given.get(name, 0.0) for name in self.eval_sets}

    @property
    def holds_out(self) -> bool:
        """Return whether a part of the training data is for evaluation."""
        return self.eval is None or None in self.eval_sets.values()

    def sources(self) -> dict[str, str | tuple[str, ...] | None]:
        """Return what each field of a source names, such as data.train or data.eval.general."""
        found = {f"data.train.{i}": source.path for i, source in enumerate(self.mixture)} or {"data.train": self.train}
        sets = {f"data.eval.{name}": source and source.path for name, source in self.eval_sets.items()}
        return {**found, **(sets or {"data.eval": self.eval})}

    @field_validator("eval_limits", mode="before")
    @classmethod
    def _none_is_no_limit(cls, value: Any) -> Any:
        """Take null, because a file of conf/ cannot empty the mapping of another."""
        return {} if value is None else value

    @field_validator("columns")
    @classmethod
    def _names_each_once(cls, value: dict[str, str]) -> dict[str, str]:
        twice = next((theirs for theirs in value.values() if list(value.values()).count(theirs) > 1), None)
        if twice is not None:
            raise ValueError(f"must name {twice!r} for one of ours alone")
        return value

    @field_validator("date")
    @classmethod
    def _is_a_day(cls, value: str | None) -> str | None:
        try:
            if value is None or str(date.fromisoformat(value)) == value:
                return value
        except ValueError:
            pass
        raise ValueError("must be a day, such as 2026-11-26")

    def describe_train(self, shown: Callable[[str], str] = str, most: int = 3) -> str:
        """Return the training source as text, with the first files of a list, each as `shown`."""
        if self.mixture:
            parts = [f"{one.weight:g} x {_named(as_list(one.path), shown, most)}" for one in self.mixture]
            return f"a mixture of {', '.join(parts)}"
        return _named(as_list(self.train), shown, most)

    def describe_eval(self) -> str:
        """Return what eval_loss is of several evaluation sets, and their limits; empty for one set."""
        weights = self.set_weights
        decides = [name if weight == 1.0 else f"{weight:g} x {name}" for name, weight in weights.items() if weight]
        others = [name for name, weight in weights.items() if not weight]
        text = f"eval_loss is {'of ' if len(decides) == 1 else 'the mean of '}{', '.join(decides)}" if weights else ""
        text += f"; {', '.join(others)} reported" if others else ""
        for name, limit in self.eval_limits.items():
            text += "" if limit.above_base is None else f"; {name} at most {limit.above_base:g} nats above the base model"
            text += "" if limit.at_most is None else f"; {name} at most {limit.at_most:g} nats"
        return text


def _named(names: tuple[str, ...], shown: Callable[[str], str], most: int) -> str:
    return ", ".join(map(shown, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def as_list(source: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the names of a data source, which may be one name or a list; none for None."""
    return (source,) if isinstance(source, str) else source or ()
