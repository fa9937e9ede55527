"""Define the data section of a trial's config: the samples, and how they become rows. No torch."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from typing import Annotated, Literal

from pydantic import Field, field_validator

from engine.config.parsing import ListAsTuple, PositiveInt, StrictModel

ON_TRAINING_SAMPLES = "train"  # value of data.eval
MAX_SEQ_LENGTH = 2**30  # positions in a row are 32-bit numbers
SeqLength = Annotated[int, Field(ge=8, le=MAX_SEQ_LENGTH)]
NonEmpty = Annotated[str, Field(min_length=1)]
DataSource = Annotated[NonEmpty | Annotated[tuple[NonEmpty, ...], Field(min_length=1)], ListAsTuple]
Column = Literal[
    "messages", "prompt", "completion", "instruction", "input", "output", "text", "system", "history", "tools", "label"
]


class DataConfig(StrictModel):
    """The training samples, and the one fixed evaluation set that all trials share."""

    train: DataSource = Field(description="file, folder, pattern (*.jsonl) or list of them; hub id; or builtin:<name>")
    train_split: NonEmpty = Field("train", description="of a hub data set or a folder")
    train_name: NonEmpty | None = Field(None, description="configuration of a hub data set or a folder")
    train_revision: NonEmpty | None = Field(None, description="revision of a hub data set")
    train_files: Annotated[tuple[NonEmpty, ...] | None, ListAsTuple] = Field(None, description="files of a hub data set")
    train_max_samples: PositiveInt | None = Field(None, description="number of rows, chosen by content; none: all")
    eval: DataSource | None = Field(
        None, description="a source as for train; none: hold out eval_fraction of train; train: the training samples themselves"
    )
    eval_split: NonEmpty = "train"
    eval_name: NonEmpty | None = Field(None, description="as train_name; none: train's, if both have one source")
    eval_revision: NonEmpty | None = Field(None, description="as train_revision; none: train's, if both have one source")
    eval_files: Annotated[tuple[NonEmpty, ...] | None, ListAsTuple] = None
    eval_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    eval_max_samples: PositiveInt = Field(256, description="number of rows, chosen by content")
    eval_max_seq_length: SeqLength = 2048
    format: Literal["auto", "messages", "prompt_completion", "text", "alpaca"] = "auto"
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
        names = as_list(self.train)
        return ", ".join(map(shown, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def as_list(source: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the names of a data source, which may be one name or a list; none for None."""
    return (source,) if isinstance(source, str) else source or ()
