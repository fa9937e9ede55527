"""List every key that a sweep's config may have, read from the models that check it.

`--help` prints these keys, and completion offers them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from engine.config.trial import TrainConfig
from engine.planning.cards import CARDS
from sweep.config.pruner_options import PRUNERS
from sweep.config.sampler_options import SAMPLERS
from sweep.config.sweep import SweepConfig
from sweep.space.unsearchable import UNSEARCHABLE

CHOSEN_BY_NAME = {"sampler": SAMPLERS, "pruner": PRUNERS}
CARD = "cluster.card"


@dataclass(frozen=True)
class Key:
    """Describe one key of the config.

    path: the key with its dots. kind: the values that it takes, in a few words. values: those that
    can be listed. owner: the sampler or pruner that has the key, empty for other sections.
    """

    path: str
    kind: str
    default: str
    about: str
    values: tuple[str, ...] = ()
    owner: str = ""


def sections() -> list[str]:
    """Return the names of the sections that have fixed keys: all but `space`."""
    return [name for name in SweepConfig.model_fields if name != "space"]


def keys(section: str) -> list[Key]:
    """Return the keys of one section. For sampler and pruner, return the keys of every kind."""
    if section in CHOSEN_BY_NAME:
        models = CHOSEN_BY_NAME[section]
        named = [Key(f"{section}.name", " | ".join(models), "", "", tuple(models))]
        return named + [
            key for name, model in models.items() for key in _keys(model, section, name) if not key.path.endswith(".name")
        ]
    return list(_keys(SweepConfig.model_fields[section].annotation, section))


def space_paths() -> list[str]:
    """Return the keys of `space`, one for each field that may vary."""
    searched = [name for name, field in TrainConfig.model_fields.items() if issubclass(field.annotation, BaseModel)]
    return [f"space.{key.path}" for section in searched for key in keys(section) if key.path not in UNSEARCHABLE]


def _keys(model: type[BaseModel], prefix: str, owner: str = "") -> Iterator[Key]:
    for name, field in model.model_fields.items():
        path, kind = f"{prefix}.{name}", field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _keys(kind, path, owner)
            continue
        values = ("auto", *CARDS) if path == CARD else tuple(dict.fromkeys(_values(kind)))
        yield Key(path, " | ".join(dict.fromkeys(_words(kind))), _default(field), field.description or "", values, owner)


def _words(kind: Any) -> Iterator[str]:
    """Yield the parts of a type as help shows them: `number` and `null`, or the names of a Literal.

    Parts that only pydantic needs are skipped.
    """
    if kind is NoneType:
        yield "null"
    elif isinstance(kind, type) and not get_args(kind):
        yield {"str": "text", "int": "number", "float": "number", "bool": "true | false"}.get(kind.__name__, kind.__name__)
    elif isinstance(kind, type | str | bool) or not get_args(kind):
        yield str(kind)
    elif get_origin(kind) is tuple:
        yield "list"
    elif get_origin(kind) is dict:  # its keys are no values of the field
        key, value = (" | ".join(dict.fromkeys(_words(part))) for part in get_args(kind))
        yield f"{{{key}: {value}}}"
    else:
        for part in _parts(kind):
            yield from _words(part)


def _values(kind: Any) -> Iterator[str]:
    if kind is bool:
        yield from ("true", "false")
    elif kind is NoneType:
        yield "null"
    elif isinstance(kind, str):
        yield kind
    elif get_origin(kind) not in (tuple, dict):
        for part in _parts(kind):
            yield from _values(part)


def _parts(kind: Any) -> tuple[Any, ...]:
    """Return all members of a union or a Literal, and the bare type of an Annotated."""
    return get_args(kind)[:1] if hasattr(kind, "__metadata__") else get_args(kind)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
