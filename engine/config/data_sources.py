"""Define the sources of samples: one of several to mix, and one of several evaluation sets. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from engine.config.parsing import ListAsTuple, StrictModel, parse
from engine.errors import InputError

MAX_SOURCES = 16
SET_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")
NonEmpty = Annotated[str, Field(min_length=1)]
DataSource = Annotated[NonEmpty | Annotated[tuple[NonEmpty, ...], Field(min_length=1)], ListAsTuple]
Weight = Annotated[float, Field(ge=0.0, le=1e6)]
Nats = Annotated[float, Field(ge=-1e6, le=1e6)]
OPTIONS = ("split", "name", "revision", "files")


class SourceConfig(StrictModel):
    """One source of samples. split, name, revision and files: as data.train_split and so on."""

    path: DataSource
    split: NonEmpty = "train"
    name: NonEmpty | None = None
    revision: NonEmpty | None = None
    files: Annotated[tuple[NonEmpty, ...] | None, ListAsTuple] = None


class MixedSource(SourceConfig):
    """One source of a mixture. weight: its share of the training tokens, relative to the other sources."""

    weight: Weight = 1.0


class EvalLimit(StrictModel):
    """The highest loss that an adapter may have on an evaluation set and win, in nats per target token."""

    above_base: Nats | None = Field(None, description="nats above the loss of the base model; below 0: it must gain")
    at_most: Nats | None = Field(None, description="the loss itself")

    @model_validator(mode="after")
    def _limits(self) -> EvalLimit:
        if self.above_base is None and self.at_most is None:
            raise ValueError("must give above_base or at_most, in nats per target token")
        return self


def _as_mixture(value: Any) -> Any:
    """Read a list with a mapping in it as sources to mix; anything else is one source."""
    if not isinstance(value, list | tuple) or not any(isinstance(one, Mapping | MixedSource) for one in value):
        return value
    if len(value) > MAX_SOURCES:
        raise InputError("data.train", f"{len(value)} sources", f"must mix at most {MAX_SOURCES} sources")
    return tuple(_source(MixedSource, one, f"data.train.{i}") for i, one in enumerate(value))


def _as_sets(value: Any) -> Any:
    """Read a mapping as evaluation sets by name, in the order of their names: JSON and YAML do not keep another."""
    if not isinstance(value, Mapping):
        return value
    for name in value:
        if not isinstance(name, str) or not SET_NAME.fullmatch(name):
            allowed = "must be the name of an evaluation set: a letter, then letters, digits, underscores, up to 40"
            raise InputError("data.eval", name, allowed)
    if not 1 <= len(value) <= MAX_SOURCES:
        given = f"{len(value)} sets" if value else {}
        raise InputError("data.eval", given, f"must hold from 1 to {MAX_SOURCES} evaluation sets")
    return {name: value[name] and _source(SourceConfig, value[name], f"data.eval.{name}") for name in sorted(value)}


def _source(kind: type[SourceConfig], value: Any, where: str) -> SourceConfig:
    if isinstance(value, SourceConfig):
        return value
    return parse(kind, dict(value) if isinstance(value, Mapping) else {"path": value}, where)


TrainSources = Annotated[DataSource | tuple[MixedSource, ...], BeforeValidator(_as_mixture)]
EvalSources = Annotated[DataSource | dict[str, SourceConfig | None], BeforeValidator(_as_sets)]


def refuse_repeats(field: str, sources: Mapping[str, SourceConfig | None]) -> None:
    """Raise InputError for a source that is there twice. sources: the rest of the field's name -> source."""
    known: dict[tuple[Any, ...], str] = {}
    for key, source in sources.items():
        found = None if source is None else (source.path, *(getattr(source, option) for option in OPTIONS))
        if found in known:
            what = "the held-out part of data.train" if source is None else str(source.path)
            raise InputError(f"{field}.{key}", what, f"is {field}.{known[found]} too; name each source once")
        known[found] = key
