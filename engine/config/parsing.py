"""Turn plain data into frozen models and back. No torch.

Every fault becomes one InputError line.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model, field_validator

from engine.errors import InputError, did_you_mean

# Up to here a whole number is exact as a float, and fits 64 bits in torch, numpy and a database.
MAX_COUNT = 10**15
MAX_SECONDS = 10**8  # three years; the system's timers take a hundred times more
PositiveInt = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
# JSON and YAML have no tuples.
ListAsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
BEGINNING = re.compile("Input should be |must be ")
CONTROL = {"Cc", "Cs", "Zl", "Zp"}  # Unicode categories: control, surrogate, line and paragraph separator


class StrictModel(BaseModel):
    """A frozen pydantic model that refuses unknown keys and silent type changes.

    For example, `"8"` is not a rank.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="after")
    @classmethod
    def _printable(cls, value: Any) -> Any:
        """Refuse control characters in names, paths and hub ids.

        They fail deep inside a system call, or break the lines of a file. Other invisible
        characters, such as a wide space or the joiner in an emoji, are common in file names.
        """
        texts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else (value,)
        if any(isinstance(text, str) and not CONTROL.isdisjoint(map(unicodedata.category, text)) for text in texts):
            raise ValueError("must be printable text, without control characters")
        return value


M = TypeVar("M", bound=BaseModel)
D = TypeVar("D")


def parse(model: type[M], data: Any, where: str = "") -> M:
    """Validate plain data into `model`.

    The first fault becomes an InputError with the field, the value and what is allowed. `where` is
    a prefix for the field's name.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _input_error(model, error.errors(), where) from None


def parse_dataclass(kind: type[D], data: Any, where: str) -> D:
    """Validate plain data into a dataclass; the first fault becomes one InputError, as in `parse`.

    Keys that the dataclass lacks are ignored: a file may come from a later version.
    """
    checked = parse(_model_of(kind), data, where)
    given = checked.model_fields_set
    return kind(**{name: value for name, value in vars(checked).items() if name in given})


@functools.cache
def _model_of(kind: type) -> type[BaseModel]:
    """The same fields as a model. Its defaults are never used: the dataclass has its own."""
    hints = get_type_hints(kind)
    required = {field.name: field.default is MISSING and field.default_factory is MISSING for field in fields(kind)}
    given = {name: (_from_json(name, hints[name]), ... if needed else None) for name, needed in required.items()}
    return create_model(kind.__name__, __config__=ConfigDict(strict=True, protected_namespaces=()), **given)


def _from_json(name: str, hint: Any) -> Any:
    """Return the type, with a validator that reads what JSON has for a dataclass or a tuple of them."""
    is_tuple = get_origin(hint) is tuple
    kind = next((one for one in get_args(hint)[: 1 if is_tuple else None] if is_dataclass(one)), None)
    if kind is None:
        as_tuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
        return Annotated[hint, as_tuple] if is_tuple else hint

    def read(value: Any) -> Any:
        if is_tuple and isinstance(value, list):
            return tuple(part(one, f"{name}.{i}") for i, one in enumerate(value))
        return value if is_tuple else part(value, name)

    def part(value: Any, where: str) -> Any:
        return parse_dataclass(kind, value, where) if isinstance(value, dict) else value

    return Annotated[hint, BeforeValidator(read)]


def to_json(config: BaseModel) -> str:
    """Return canonical JSON: keys are sorted, so equal configs give equal text."""
    return json.dumps(config.model_dump(mode="json"), sort_keys=True, indent=2)


def load_json(path: str | Path) -> Any:
    """Read a JSON file; raise InputError if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise InputError("file", str(path), f"must be a readable JSON file ({error.strerror})") from None
    except ValueError as error:
        raise InputError("file", str(path), f"must be valid JSON ({error})") from None
    except RecursionError:
        raise InputError("file", str(path), "must be valid JSON, nested less deeply") from None


def _input_error(model: type[BaseModel], faults: list[dict[str, Any]], where: str) -> InputError:
    """Return the InputError for the first fault.

    For a union pydantic reports one fault a kind; the message then lists all the allowed kinds. If the
    value is of one kind but for a part of it, that part is the fault.
    """
    fault = faults[0]
    location = _location(model, fault["loc"])
    if fault["type"].endswith("_type"):
        places = [(other, _location(model, other["loc"])) for other in faults]
        fault, location = next((one for one in places if one[1][:-1] == location), (fault, location))
    field = ".".join(filter(None, [where, *location])) or model.__name__
    if fault["type"] == "extra_forbidden":
        known = _known_keys(model, fault["loc"][:-1])
        hint = did_you_mean(location[-1], known)
        return InputError(field, fault["input"], f"unknown key; known keys: {', '.join(known)}{hint}")
    if fault["type"] == "missing":
        return InputError(field, None, "required, but missing")
    phrases = [_phrase(other) for other in faults if _location(model, other["loc"]) == location]
    phrases = [text for text in phrases if not any(other.startswith(f"{text} of ") for other in phrases)]
    message = " or ".join(dict.fromkeys([phrases[0], *(BEGINNING.sub("", text) for text in phrases[1:])]))
    value = list(fault["input"]) if isinstance(fault["input"], tuple) else fault["input"]
    field, value, message = _part_named(field, value, message)
    return InputError(field, value, message[:1].lower() + message[1:])


def _part_named(field: str, value: Any, message: str) -> tuple[str, Any, str]:
    """Return field, value and message; those of a part, if a section's message begins with the part's dotted name.

    A part that the section does not give is not found: its default is no fault of the input.
    """
    name, _, rest = message.partition(" ")
    part = value
    for key in name.split("."):
        if not isinstance(part, dict) or key not in part:
            return field, value, message
        part = part[key]
    return f"{field}.{name}", part, rest


def _phrase(fault: dict[str, Any]) -> str:
    """Return what is allowed, in the words of a config file; pydantic's own where these are plain."""
    value, limits = fault["input"], fault.get("ctx", {})
    match fault["type"]:
        case "tuple_type":
            return "must be a list" + (f": [{value}]" if isinstance(value, str | int | float) and value != "" else "")
        case "dict_type" | "model_type":
            return "must be a section: {key: value}"
        case "int_type" if isinstance(value, float) and value.is_integer():  # like 1e6
            return f"{fault['msg']}: write {int(value)}"
        case "bool_type":
            return "must be true or false"
        case "string_type":
            return "must be text"
        case "string_too_short":
            return "must be text that is not empty"
        case "too_short":
            return f"must be a list of at least {limits['min_length']}"
    return fault["msg"].removeprefix("Value error, ")


def _location(model: Any, path: tuple[str | int, ...]) -> list[str]:
    """Return the field names, keys and list positions in `path`.

    pydantic also puts the branch of a union there. It is not a key in the file, so it is left out.
    """
    location, kind = [], model
    for part in path:
        is_model = isinstance(kind, type) and issubclass(kind, BaseModel)
        is_dict = get_origin(kind) is dict
        if isinstance(part, int) or is_model or is_dict:
            location.append(str(part))
        if is_model:
            field = kind.model_fields.get(str(part))
            kind = field.annotation if field else None
        else:
            kind = get_args(kind)[1] if is_dict else None
        kind = _without_none(kind)
    return location


def _without_none(kind: Any) -> Any:
    """Return the type without annotations; of one kind or none, that kind."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    kinds = [one for one in get_args(kind) if one is not type(None)] if get_origin(kind) in (Union, UnionType) else []
    return _without_none(kinds[0]) if len(kinds) == 1 else kind


def _known_keys(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return sorted(model.model_fields)
