"""List the numeric fields of a config, and numbers that break what was not made for them."""

from __future__ import annotations

import types
from typing import Any, get_args, get_origin

from pydantic import BaseModel

NASTY = [
    0, 1, -1, 2, 8, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30), 10**400, 0.0, -0.0, 0.5, 1.0,
    0.9999999,    1 - 2**-53, 1e-320, 1e-38, 1e-9, 1e15, 1e300, -1e300, float("inf"), float("-inf"), float("nan"), True, False,
]  # fmt: skip


def numeric_fields(model: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += numeric_fields(field.annotation, f"{prefix}{name}.")
        elif takes_numbers(field.annotation):
            found.append(f"{prefix}{name}")
    return found


def takes_numbers(kind: Any) -> bool:
    if isinstance(kind, type) and not isinstance(kind, types.GenericAlias):
        return issubclass(kind, int | float) and kind is not bool
    if get_origin(kind) is dict:  # variables of a template: any number is right
        return False
    return any(takes_numbers(part) for part in get_args(kind) if not isinstance(part, str))
