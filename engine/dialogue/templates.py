"""Find a chat template, render messages with it, and find what it leaves out of them.

transformers compiles the template: its sandbox, filters and `{% generation %}` tags are used. Three
things are added. The day is an argument, so that a template that prints it writes the same text
tomorrow. A thought is passed under each name that the template reads. A special token that stands
in a message is put between two marks, so that it is never encoded as that token.

What is not written cannot be learnt. A word of a message may stand in the text by chance, so each
shape of conversation is rendered once more with words that stand nowhere else.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from engine.dialogue.conversation import SampleError, TargetText
from engine.errors import InputError, first_line
from engine.system.user_path import user_path

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_CHARACTERS = 10_000_000  # per sample: about two million tokens, more than any card holds
TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2")
MARKS = ("\ufdd0", "\ufdd1")  # noncharacters: Unicode keeps them for use inside a program
REASONING = ("reasoning_content", "thinking", "reasoning", "reasoning_text", "thinking_content", "thought", "thoughts")
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
        moment = datetime.combine(self._day, time()) if self._day else None
        now = {"strftime_now": lambda form: (moment or datetime.now()).strftime(form)}
        return environment.from_string(self.text, globals=now)


class LeftOutError(SampleError):
    """Name what the template leaves out of a message."""


def check_written(
    messages: Sequence[Mapping[str, Any]], learned: Sequence[int], tools: Any, answers: Sequence[TargetText]
) -> None:
    """Raise LeftOutError if an answer, or something in its context, was not written.

    answers: one for each learned message. Thoughts of other messages may be left out: many templates
    do that by design, and the model then answers without them.
    """
    done, texts = 0, [(found.text[: found.start], found.text[found.start : found.end]) for found in answers]
    for i, (prompt, answer) in zip(learned, texts):
        for j in range(done, i + 1):
            text, where = answer if j == i else prompt, f"message {j + 1} ({messages[j]['role']}):"
            if name := first_absent(messages[j], text, thought=j == i):
                raise LeftOutError(f"{where} the chat template does not write its {name}; take it out, or set data.chat_template")
            if name := python_in(messages[j], text):
                raise LeftOutError(f"{where} the chat template writes its {name} as Python source; set data.chat_template")
        done = i + 1
    if missing := [name for name in _tool_names(tools) if name not in texts[0][0]]:
        raise LeftOutError(f"tools: the chat template does not write {missing[0]!r}; take them out, or set data.chat_template")


def first_absent(message: Mapping[str, Any], text: str, thought: bool) -> str | None:
    """Return the name of the first part of the message that `text` lacks, or None.

    thought: look for the message's thought too.
    """
    return next((name for name, forms in _parts(message, thought) if not any(form in text for form in forms)), None)


def python_in(message: Mapping[str, Any], text: str) -> str | None:
    """Return the name of a part that stands in `text` as Python source, or None."""
    values = {f"tool_calls[{i}].function.arguments": _function(call).get("arguments") for i, call in _calls(message)}
    values["content"] = message.get("content")
    sources = {name: (repr(value), _written(value)) for name, value in values.items() if value and isinstance(value, dict | list)}
    return next((name for name, (source, forms) in sources.items() if source in text and source not in forms), None)


def with_unique_words(value: Any) -> Any:
    """Return messages and tools with a word that stands nowhere else for each text of theirs."""
    words: dict[str, str] = {}

    def unique(value: Any, key: str, inside: bool) -> Any:
        if isinstance(value, Mapping):
            return {k: unique(v, k, inside or k in ("arguments", "content")) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [unique(item, key, inside) for item in value]
        if not isinstance(value, str) or not value.strip() or key in ("role", "type", "id", "tool_call_id"):
            return value
        return words.setdefault(value, f"qx{len(words)}zw") if inside or key == "name" or key in REASONING else value

    return unique(value, "", False)


def shape(value: Any) -> Any:
    """Return what two conversations share if a template treats their parts alike."""
    if isinstance(value, Mapping):
        return tuple((k, v if k in ("role", "type") else shape(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return tuple(shape(item) for item in value)
    return bool(value.strip()) if isinstance(value, str) else type(value).__name__


def _tool_names(tools: Any) -> list[str]:
    """Return the names of the functions that a conversation's tools describe."""
    names = [_function(tool).get("name") for tool in tools or () if isinstance(tool, Mapping)]
    return [name for name in names if isinstance(name, str)]


def _parts(message: Mapping[str, Any], thought: bool) -> Iterator[tuple[str, list[str]]]:
    if thought and (text := thought_of(message)):
        yield next(name for name in REASONING if name in message), _written(text)
    content = message.get("content")
    for part in content if isinstance(content, list) else [content]:
        yield "content", _written(part.get("text") if isinstance(part, Mapping) else part)
    for i, call in _calls(message):
        where, arguments = f"tool_calls[{i}].function", _function(call).get("arguments")
        yield f"{where}.name", _written(_function(call).get("name"))
        if isinstance(arguments, str):
            yield f"{where}.arguments", [arguments]  # JSON already: in quotes it would be another text
        else:
            yield from _leaves(arguments, f"{where}.arguments")


def _calls(message: Mapping[str, Any]) -> list[tuple[int, Mapping[str, Any]]]:
    return [(i, call) for i, call in enumerate(message.get("tool_calls") or ()) if isinstance(call, Mapping)]


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function", call)
    return function if isinstance(function, Mapping) else {}


def _leaves(value: Any, path: str) -> Iterator[tuple[str, list[str]]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield path, _written(key)
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item, path)
    else:
        yield path, _written(value)


def _written(value: Any) -> list[str]:
    """Return the forms in which a template may write the value."""
    if value is None:
        return [""]
    if not isinstance(value, str):
        plain = [] if isinstance(value, dict | list) else [str(value)]
        return [json.dumps(value), json.dumps(value, ensure_ascii=False), *plain]
    text = value.strip()
    return [text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]]
