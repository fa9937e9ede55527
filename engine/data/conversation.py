"""Define what lies between the formats of data files and the chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class SampleError(Exception):
    """Say in one line what is wrong with one sample; the caller adds the sample's name."""


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


@dataclass(frozen=True)
class Encoded:
    """One row for training: token ids, and which of them carry loss."""

    input_ids: list[int]
    is_target: list[bool]
