"""Know in which form one template takes messages, and render them in that form.

Templates differ: content as text or as parts, arguments as an object or as JSON, thoughts beside
the content, in it, or nowhere. What a template takes is found with probes, before the first sample.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from engine.dialogue.conversation import SampleError
from engine.dialogue.templates import (
    MARKS,
    REASONING,
    WAS_INLINE,
    ChatTemplate,
    Rendered,
    common_prefix,
    thought_of,
    with_thought_apart,
)  # fmt: skip

Messages = list[dict[str, Any]]
PROBES = ("qxquestionzw", "qxanswerzw", "qxthoughtzw")
QUESTION, ANSWER = ({"role": role, "content": word} for role, word in zip(("user", "assistant"), PROBES))


class Dialect:
    """Pass messages to one template in the form that it takes."""

    def __init__(self, template: ChatTemplate, ends: Sequence[str], special: Sequence[str]) -> None:
        """ends: the tokens that end generation. special: all special tokens."""
        self.template, self.given, self.special = template, tuple(ends), any_of([*ends, *special])
        self.ends = any_of(self.given)  # and the template's own
        self.prompt = self.opening = ""  # a question, and the generation prompt behind it
        self.wants_json = False
        self._wants_parts = self._wants_none = self._keeps_inline = False
        self._reads_thoughts, self._tags_thoughts = template.reads_thoughts, "</think>" in template.text
        self._learn()

    @property
    def joins_thoughts(self) -> bool:
        """Return whether the template takes a thought only inside the content."""
        return self._tags_thoughts and not self._reads_thoughts

    def prepared(self, messages: Sequence[Mapping[str, Any]]) -> Messages:
        """Return the messages as `render` takes them: thoughts beside the content, tokens marked."""
        return self.template.prepared([self._read(message) for message in messages])

    def render(self, messages: Messages, generate: bool, tools: Any) -> Rendered:
        """Return what the template writes. SampleError if it refuses."""
        new = -1 if generate else len(messages) - 1
        return self.template.render([self._form(message, i == new) for i, message in enumerate(messages)], generate, tools)

    def attempt(self, messages: Messages, generate: bool, tools: Any) -> Rendered | None:
        """Return what the template writes, or None if it refuses."""
        try:
            return self.render(messages, generate, tools)
        except SampleError:
            return None

    def header(self, before: Messages, tools: Any) -> str:
        """Return what the template writes before the content of a plain answer."""
        answers = ([*before, {"role": "assistant", "content": word}] for word in "1Z")
        return common_prefix(*(self.render(messages, False, tools).text for messages in answers))

    def _learn(self) -> None:
        """Find the template's own end token, and the forms that it takes."""
        prompt = self.attempt([QUESTION], False, None)
        if prompt is None or PROBES[0] not in prompt.text:
            self._wants_parts = True
            prompt = self.attempt([QUESTION], False, None)
            self._wants_parts = prompt is not None and PROBES[0] in prompt.text and "'type'" not in prompt.text
        self.prompt = prompt.text if prompt else ""
        self.opening = asked.text.removeprefix(self.prompt) if (asked := self.attempt([QUESTION], True, None)) else ""
        call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}
        empty, none = (self.attempt([QUESTION, {**call, "content": content}], False, None) for content in ("", None))
        self._wants_none = bool(empty and none) and empty.text != none.text and empty.text.startswith(none.text)
        inline = {"role": "assistant", "content": f"<think>\n{PROBES[2]}\n</think>\n\n{PROBES[1]}"}
        apart, kept = (self.attempt([QUESTION, *self.template.prepared([m])], False, None) for m in (self._read(inline), inline))
        is_text = bool(kept) and PROBES[2] in kept.text and not (apart and PROBES[2] in apart.text)
        self._keeps_inline = is_text and not self._tags_thoughts
        one, two = self.attempt([QUESTION, ANSWER], False, None), self.attempt([QUESTION, ANSWER, QUESTION], False, None)
        if one is None:
            return
        tail = one.text.rpartition(PROBES[1])[2]
        shared = common_prefix(tail, two.text.partition(PROBES[1])[2]) if two else tail
        tokens = self.special.findall(shared) or self.special.findall(tail)[:1]
        self.ends = any_of([*self.given, *([token for token in tokens if token in self.given] or tokens[-1:])])

    def _read(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return the message with a thought that stands in its content put beside it."""
        apart = (self._tags_thoughts or self._reads_thoughts) and not self._keeps_inline
        read = with_thought_apart(message) if apart else dict(message)
        if self.wants_json and message.get("tool_calls"):
            read["tool_calls"] = [_with_json(call) for call in message["tool_calls"]]
        return read

    def _form(self, message: Mapping[str, Any], is_new: bool) -> dict[str, Any]:
        """Return the message in the form that this template takes.

        is_new: it is the answer to learn. Earlier ones are passed as the data have them.
        """
        thought, content = thought_of(message) if message["role"] == "assistant" else None, message.get("content")
        if thought is not None and not thought.strip():  # some templates write an empty thought wherever there is a key
            message = {key: value for key, value in message.items() if key not in REASONING}
        if thought is not None and self.joins_thoughts and (is_new or WAS_INLINE in message):
            content = f"<think>\n{thought}\n</think>\n\n{content or ''}"
        if self._wants_parts and isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if content == "" and message.get("tool_calls") and self._wants_none:
            content = None  # else an empty answer is written behind the call
        return {**message, "content": content} if "content" in message else dict(message)


def _with_json(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    written = {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}
    return {**call, "function": written} if "function" in call else written


def any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern for these tokens where they stand as tokens, not as text."""
    longest_first = sorted({token for token in tokens if token.strip()}, key=len, reverse=True)
    return re.compile(f"(?<!{MARKS[0]})(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})")
