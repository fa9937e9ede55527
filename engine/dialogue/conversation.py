"""Define what lies between the formats of data files and the chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Self


class SampleError(Exception):
    """Say what is wrong with one sample; the reader adds the sample's name."""

    def at(self, where: str) -> Self:
        """Return the same error with the place before its text."""
        found = copy(self)
        found.args = (f"{where}{self}",)
        return found


@dataclass(frozen=True)
class Conversation:
    """One dialogue: messages as a template reads them, and which of them the model learns."""

    messages: tuple[Mapping[str, Any], ...]  # role, content (str), and tool_calls, reasoning_content, name, tool_call_id if given
    learned: tuple[bool, ...]  # one for each message; only assistant messages may be True
    tools: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True)
class Document:
    """Plain text: a prompt without loss, and what follows it with loss. prompt is "" for free text."""

    prompt: str
    completion: str
    notes: tuple[str, ...] = field(default=(), compare=False)  # what was done about it that its author may not expect


@dataclass(frozen=True)
class AnswerPair:
    """A chosen and a rejected answer to one prompt. Both begin with the prompt, which carries no loss."""

    chosen: Conversation | Document
    rejected: Conversation | Document

    @property
    def notes(self) -> tuple[str, ...]:
        return self.chosen.notes if isinstance(self.chosen, Document) else ()


@dataclass(frozen=True)
class Encoded:
    """One row for training: token ids, and which of them carry loss."""

    input_ids: list[int]
    is_target: list[bool]
    notes: tuple[str, ...] = ()  # what was done about this sample that its author may not expect


@dataclass(frozen=True)
class TargetText:
    """Hold a text and the character ranges [start, end) that carry loss.

    Special tokens between the marks of engine/dialogue/templates.py are text. notes: what the author of the data may not expect.
    is_chat: a template wrote the text, with the tokens before it that the tokenizer would add.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    notes: tuple[str, ...] = ()
    is_chat: bool = True

    @property
    def start(self) -> int:
        return self.spans[0][0]

    @property
    def end(self) -> int:
        return self.spans[-1][1]
