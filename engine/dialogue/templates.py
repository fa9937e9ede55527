"""Find a chat template, and render messages with it.

transformers compiles the template: its sandbox, filters and `{% generation %}` tags are used. Three
things are added. The day is an argument, so that a template that prints it writes the same text
tomorrow. A thought is passed under each name that the template reads. A special token that stands
in a message is put between two marks, so that it is never encoded as that token.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from engine.dialogue.conversation import SampleError
from engine.errors import InputError, first_line
from engine.system.user_path import user_path

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_CHARACTERS = 10_000_000  # per sample: about two million tokens, more than any card holds
TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2")
MARKS = ("\ufdd0", "\ufdd1")  # noncharacters: Unicode keeps them for use inside a program
MARKED = re.compile(f"{MARKS[0]}(.*?){MARKS[1]}", re.DOTALL)
REASONING = ("reasoning_content", "thinking", "reasoning", "reasoning_text", "thinking_content", "thought", "thoughts")
SWITCHES = ("enable_thinking", "thinking", "thinking_mode", "enable_reasoning")  # variables that turn thoughts on or off
RESERVED = ("messages", "tools", "add_generation_prompt")
THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
WAS_INLINE = "thought_in_content"  # key of a message whose thought stood in its content
TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def chat_template(tokenizer: Any, wanted: str | None) -> str | None:
    """Return the Jinja text of the template: the tokenizer's own, `chatml`, or a file's content.

    InputError for a name that is none of these.
    """
    if wanted is None:
        named = tokenizer.chat_template
        return named.get("default") if isinstance(named, dict) else named
    if wanted == "chatml":
        return CHATML
    try:
        # Only Jinja files: a config from elsewhere must not turn any other file into training text.
        if Path(wanted).suffix in TEMPLATE_SUFFIXES:
            return user_path(wanted).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        pass
    kinds = ", ".join(TEMPLATE_SUFFIXES)
    raise InputError("data.chat_template", wanted, f"allowed: none (the tokenizer's own), chatml, or a Jinja file ({kinds})")


def tool_template(tokenizer: Any, wanted: str | None) -> str | None:
    """Return the template that transformers takes for dialogues with tools, if it is another one."""
    named = tokenizer.chat_template
    return named.get("tool_use") if wanted is None and isinstance(named, dict) else None


def prints_date(template: str | None) -> bool:
    """Return whether what the template writes depends on the day."""
    return template is not None and "strftime_now" in template


def reads(template: str, names: Iterable[str]) -> list[str]:
    """Return those of the names that the template has as words, outside of tokens and tags."""
    return [name for name in names if re.search(rf"(?<![\w<|/\[]){re.escape(name)}(?![\w>|\]])", template)]


def common_prefix(*texts: str) -> str:
    """Return the longest text with which all the texts begin."""
    return os.path.commonprefix(texts)  # noqa: RUF071 - they are no paths


def thought_of(message: Mapping[str, Any]) -> str | None:
    """Return the thought before an answer, under whichever name the data has it; None if none."""
    return next((message[name] for name in REASONING if isinstance(message.get(name), str)), None)


def with_thought_apart(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message with a thought that begins its content put beside the content."""
    content, is_answer = message.get("content"), message["role"] == "assistant" and thought_of(message) is None
    found = THOUGHT.fullmatch(content) if is_answer and isinstance(content, str) else None
    if not found:
        return dict(message)
    return {**message, "reasoning_content": found[1].strip("\n"), "content": found[2].lstrip("\n"), WAS_INLINE: True}


@dataclass(frozen=True)
class Rendered:
    """Hold a text, and the character ranges that `{% generation %}` tags enclose."""

    text: str
    tags: tuple[tuple[int, int], ...] = ()


def _joined(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return the ranges that are not empty; those that touch are one."""
    found: list[tuple[int, int]] = []
    for start, end in ranges:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        elif end > start:
            found.append((start, end))
    return tuple(found)


class ChatTemplate:
    """Render messages with one template, which is compiled at the first call."""

    def __init__(
        self, text: str, variables: Mapping[str, Any], day: date | None, tokens: Mapping[str, Any], marked: Sequence[str]
    ) -> None:
        """Set what the template reads besides messages.

        variables: the user's. day: None is today. tokens: the tokenizer's, such as bos_token.
        marked: tokens that messages may hold only as text.
        """
        self.text, self.variables, self._day = text, dict(variables), day
        self._values = {"documents": None, **tokens, **variables}
        longest_first = sorted(filter(None, marked), key=len, reverse=True)
        self._marked = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # transformers passes a thought under the first two names, whatever the template reads.
        known = [name for name in REASONING if re.search(rf"(\.|['\"]){name}\b", text)]
        self.reads_thoughts, self._reasoning = bool(known), list(dict.fromkeys([*REASONING[:2], *known]))
        self.has_tags = TAG.search(text) is not None
        self._compiled: Any = None

    def render(self, messages: Sequence[Mapping[str, Any]], generate: bool, tools: Any = None) -> Rendered:
        """Return what the template writes. `messages` and `tools` come from `prepared`."""
        blocks: list[str] = []
        tags: list[tuple[int, int]] = []
        try:
            self._compiled = self._compiled or self._compile()
            values = {**self._values, "messages": list(messages), "tools": tools, "add_generation_prompt": generate}
            with self._compiled.environment.activate_tracker(blocks, tags):
                for block in self._compiled.generate(**values):
                    blocks.append(block)
            text = "".join(blocks)
        except MemoryError:
            raise
        except Exception as error:  # a template raises TemplateError with any message
            raise SampleError(f"the chat template refused it: {first_line(error)}") from error
        if len(text) > MAX_CHARACTERS:
            raise SampleError(f"the chat template makes {len(text):,} characters of it; at most {MAX_CHARACTERS:,} are allowed")
        return Rendered(text, _joined(tags))

    def prepared(self, value: Any) -> Any:
        """Return plain data in which special tokens are marked and thoughts have every known name."""
        if isinstance(value, str):
            return self._marked.sub(lambda found: f"{MARKS[0]}{found[0]}{MARKS[1]}", value)
        if isinstance(value, Mapping):
            plain = {str(key): self.prepared(item) for key, item in value.items() if item is not None or "role" not in value}
            thought = thought_of(plain) if plain.get("role") == "assistant" else None
            return plain if thought is None else {**plain, **dict.fromkeys(self._reasoning, thought)}
        if isinstance(value, list | tuple):
            return [self.prepared(item) for item in value]
        return value if value is None or type(value) in (bool, int, float) else str(value)

    def _compile(self) -> Any:
        from transformers.utils import chat_template_utils

        # All templates share one environment. A template with a global of its own needs no patch.
        environment = chat_template_utils._compile_jinja_template("").environment
        moment = datetime.combine(self._day, time()) if self._day else datetime.now()  # one for all texts of a dialogue
        now = {"strftime_now": moment.strftime}
        return environment.from_string(self.text, globals=now)
