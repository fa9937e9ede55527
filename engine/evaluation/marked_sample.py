"""Show a training sample as the model sees it, with the tokens marked that carry loss.

On a terminal the marks are colours, elsewhere they are brackets. Text of the data is shown as text:
what would steer a terminal is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from typing import Any, TextIO

from engine.data.packing import Sample
from engine.errors import printable

COLOUR, PLAIN = ("\x1b[1;32m", "\x1b[0m"), ("⟦", "⟧")
"""What stands before and after the marked tokens."""


def marked(sample: Sample, tokenizer: Any, marks: tuple[str, str]) -> str:
    """Return the sample's text with every run of target tokens between the marks."""
    text = ""
    for part, is_target in runs(sample.input_ids.tolist(), carries_loss(sample), tokenizer):
        shown = "\n".join(printable(line) for line in part.split("\n"))
        for mark in PLAIN if marks == PLAIN else ():
            shown = shown.replace(mark, f"\\u{ord(mark):04x}")
        text += f"{marks[0]}{shown}{marks[1]}" if is_target else shown
    return text


def carries_loss(sample: Sample) -> list[bool]:
    """Return for each token whether it carries loss. The first does not: nothing stands before it to predict it."""
    return [False, *sample.is_target[1:].tolist()][: len(sample.is_target)]


def runs(ids: Sequence[int], is_target: Sequence[bool], tokenizer: Any) -> list[tuple[str, bool]]:
    """Return the text in runs of tokens that carry loss or do not.

    A run is what its tokens add to the text before them: a tokenizer may write the first token of a
    text without its space. Where a run begins inside a character, it is decoded alone.
    """
    found, start = [], 0
    for kind, group in groupby(map(bool, is_target)):
        end = start + len(list(group))
        before, whole = _decode(ids[:start], tokenizer), _decode(ids[:end], tokenizer)
        found.append((whole[len(before) :] if whole.startswith(before) else _decode(ids[start:end], tokenizer), kind))
        start = end
    return found


def marks_for(stream: TextIO) -> tuple[str, str]:
    """Return colours for a terminal that shows them, else brackets."""
    return COLOUR if stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" else PLAIN


def legend(marks: tuple[str, str]) -> str:
    """Return the words that explain the marks."""
    return f"{marks[0]}marked like this{marks[1]}" if marks == COLOUR else f"between {marks[0]} and {marks[1]}"


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
