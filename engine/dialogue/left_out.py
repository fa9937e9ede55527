"""Find what a chat template leaves out of messages.

What is not written cannot be learnt. A word of a message may stand in the text by chance, so each
shape of conversation is rendered once more with words that stand nowhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any

from engine.dialogue.conversation import SampleError, TargetText
from engine.dialogue.templates import MARKED, MARKS, REASONING, thought_of


class LeftOutError(SampleError):
    """Name what the template leaves out: a part of the message with this index, or None for tools."""

    def __init__(self, text: str, index: int | None = None, part: str = "tools") -> None:
        super().__init__(text)
        self.index, self.part = index, part


def check_written(
    messages: Sequence[Mapping[str, Any]], learned: Sequence[int], tools: Any, answers: Sequence[TargetText]
) -> bool:
    """Return whether the thought of an answer was left out.

    answers: one for each learned message. LeftOutError if anything else of an answer or of its context
    was not written, or nothing of an answer. Thoughts of other messages may be left out: many
    templates do that by design, and the model then answers without them.
    """
    done, lacks_thought, texts = 0, False, [(found.text[: found.start], found.text[found.start : found.end]) for found in answers]
    for i, (prompt, answer) in zip(learned, texts):
        for j in range(done, i + 1):
            is_all = j == i and not any(form for _, forms in _parts(messages[j], thought=False) for form in forms)
            if found := fault(messages, j, answer if j == i else prompt, thought=is_all):
                raise found
        lacks_thought |= first_absent(messages[i], answer, thought=True) is not None
        done = i + 1
    if missing := [name for name in _tool_names(tools) if name not in texts[0][0]]:
        raise LeftOutError(f"tools: the chat template does not write {missing[0]!r}")
    return lacks_thought


def fault(messages: Sequence[Mapping[str, Any]], j: int, text: str, thought: bool = False) -> LeftOutError | None:
    """Return what is wrong with `text` as the place of message j, or None. thought: it must hold the thought."""
    where = f"message {j + 1} ({messages[j]['role']}): the chat template"
    if name := first_absent(messages[j], text, thought):
        return LeftOutError(f"{where} does not write its {name}", j, name)
    if name := python_in(messages[j], text):
        return LeftOutError(f"{where} writes its {name} as Python source", j, name)
    return None


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


def with_plain_tokens(messages: Sequence[Mapping[str, Any]]) -> tuple[Any, dict[str, str]]:
    """Return the messages with a plain word for each marked token, and the token of each word."""
    words: dict[str, str] = {}

    def plain(found: re.Match[str]) -> str:
        word = f"qxtoken{len(words)}zw"
        words[word] = found[1]
        return f"{MARKS[0]}{word}{MARKS[1]}"

    written = MARKED.sub(plain, json.dumps(messages, ensure_ascii=False))
    return json.loads(written), {word: json.loads(f'"{token}"') for word, token in words.items()}


def renumbered(error: SampleError, kept: Sequence[int]) -> SampleError:
    """Return the error with the index that its message has in the data. kept: the indices of those rendered."""
    found = copy(error)
    found.args = (re.sub(r"^message (\d+)", lambda number: f"message {kept[int(number[1]) - 1] + 1}", str(error)),)
    if isinstance(found, LeftOutError) and found.index is not None:
        found.index = kept[found.index]
    return found


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
