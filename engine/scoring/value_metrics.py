"""Compare an answer with a reference by the value that it writes: a number or JSON."""

from __future__ import annotations

import json
import re
from decimal import Decimal, InvalidOperation
from typing import Any

NUMBER = re.compile(r"[-+]?[$€£¥]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
MINUS = str.maketrans("\u2212\uff0d", "--")


def last_number(text: str) -> Decimal | None:
    """Return the last number in the text, with commas between thousands; None if it has none.

    A sign counts only where no letter or digit stands before it: 3-4 ends with 4. A sign of currency
    may stand behind it, and the minus of typesetting (U+2212) is one.
    """
    text = text.translate(MINUS)
    found = list(NUMBER.finditer(text))
    if not found:
        return None
    written, start = re.sub("[,$€£¥]", "", found[-1][0]), found[-1].start()
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
    """Return 1 if both are JSON with equal content: keys in any order, and 1 equals 1.0, not true.

    Numbers are compared in all their digits. Of a key that stands twice the last value counts.
    """
    ours, theirs = _parsed(answer), _parsed(reference)
    return float(ours is not None and theirs is not None and _same(ours[0], theirs[0]))


def _parsed(text: str) -> tuple[Any] | None:
    try:
        return (json.loads(text, parse_constant=_refuse, parse_float=_number, parse_int=_number),)
    except (ValueError, RecursionError):
        return None


def _number(text: str) -> Decimal | float:
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent that nothing holds
        return float(text)


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _same(one: Any, other: Any) -> bool:
    pairs = [(one, other)]  # no recursion: an answer may nest deeper than Python calls
    while pairs:
        one, other = pairs.pop()
        if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
            pairs += [(value, other[key]) for key, value in one.items()]
        elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
            pairs += zip(one, other)
        elif type(one) is not type(other) or isinstance(one, dict | list) or one != other:
            return False
    return True
