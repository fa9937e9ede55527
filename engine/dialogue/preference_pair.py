"""Find prompt, chosen and rejected answer in a row of preference data, in the forms that TRL takes.

Answers are text or lists of messages. The prompt is a column of its own, or what both answers begin
with: then it ends before the first difference, and text keeps the blank there in the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.dialogue.conversation import AnswerPair, Conversation, Document, SampleError

COLUMNS = ("prompt", "chosen", "rejected")
LONG = 20  # characters of a prompt that no two answers repeat by chance


def read_pair(row: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Conversation | Document]) -> AnswerPair:
    """Return the pair of a row. read: reads a row of `prompt` and `completion`. Raises SampleError."""
    prompt, chosen, rejected = _parts(row)
    if chosen == rejected:
        raise SampleError("chosen and rejected are equal, so there is nothing to prefer")
    others = {name: value for name, value in row.items() if name not in COLUMNS}
    sides = []
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        try:
            sides.append(read({**others, "prompt": prompt, "completion": answer}))
        except SampleError as error:
            raise error.at(f"{name}: ") from None
    return AnswerPair(*sides)


def _parts(row: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return prompt, chosen and rejected; the answers without the prompt."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if is_list(chosen) != is_list(rejected):
        raise SampleError("chosen and rejected must both be text or both lists of messages")
    if not is_list(chosen):
        if not (isinstance(chosen, str) and isinstance(rejected, str)):
            raise SampleError("chosen and rejected must be text or lists of messages")
        if prompt is None:
            start = _common_text(chosen, rejected)
            return chosen[:start], chosen[start:], rejected[start:]
        if isinstance(prompt, str) and len(prompt) >= LONG and chosen.startswith(prompt) and rejected.startswith(prompt):
            return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
        return prompt, chosen, rejected
    length = _common(chosen, rejected)
    if prompt is None or (not is_list(prompt) and length):  # UltraFeedback repeats a prompt in text as first message
        if not length:
            raise SampleError("chosen and rejected must begin with the same prompt, or stand beside a column prompt")
        return chosen[:length], chosen[length:], rejected[length:]
    if is_list(prompt) and prompt and length >= len(prompt) and list(chosen[: len(prompt)]) == list(prompt):
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    return prompt, chosen, rejected


def is_list(value: Any) -> bool:
    """Return whether the value is a list of messages, which a table may hold as an array."""
    return isinstance(value, (list, tuple))


def _common(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Return the number of messages that both begin with. One that has no more messages keeps its last one."""
    most = min(len(chosen), len(rejected))
    return next((i for i in range(most) if chosen[i] != rejected[i]), most)


def _common_text(chosen: str, rejected: str) -> int:
    most = min(len(chosen), len(rejected))
    length = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    return length - (length > 0 and chosen[length - 1] == " ")
