"""Compare an answer with a reference by the value that it writes: a number or JSON."""

from __future__ import annotations

import json
import re
from decimal import Decimal, InvalidOperation
from typing import Any

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?:[eE][-+]?\d{1,3})?")


def last_number(text: str) -> Decimal | None:
    """Return the last number in the text, with commas between thousands; None if it has none.

    A sign counts only where no letter or digit stands before it: 3-4 ends with 4.
    """
    found = [match for match in NUMBER.finditer(text) if any(map(str.isdigit, match[0]))]
    if not found:
        return None
    written, start = found[-1][0].replace(",", ""), found[-1].start()
    if written[0] in "+-" and start and (text[start - 1].isalnum() or text[start - 1] in ")]"):
        written = written[1:]
    try:
        return Decimal(written)
    except InvalidOperation:  # digits of other scripts that no number has
        return None


def number_match(answer: str, reference: str) -> float:
    """Return 1 if the last numbers of both texts are equal in value; 0 if one has none."""
    ours, theirs = last_number(answer), last_number(reference)
    return float(ours is not None and ours == theirs)


def json_valid(answer: str) -> float:
    """Return 1 if the answer is one JSON value and nothing else."""
    return float(_parsed(answer) is not None)


def json_equal(answer: str, reference: str) -> float:
    """Return 1 if both are JSON with equal content: keys in any order, and 1 equals 1.0, not true."""
    ours, theirs = _parsed(answer), _parsed(reference)
    return float(ours is not None and theirs is not None and _same(ours[0], theirs[0]))


def _parsed(text: str) -> tuple[Any] | None:
    try:
        return (json.loads(text, parse_constant=_refuse),)
    except (ValueError, RecursionError):
        return None


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    return (numbers or type(one) is type(other)) and one == other
