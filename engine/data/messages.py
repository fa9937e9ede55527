"""Read one message of a dialogue in the forms that data files give it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from engine.dialogue.conversation import SampleError
from engine.dialogue.templates import MARKS, REASONING

ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "bot": "assistant",
    "model": "assistant", "ai": "assistant", "function_call": "assistant", "observation": "tool",
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "function", "ipython")},
}  # fmt: skip
LEARNED, MASKED = ("weight", "train", "training", "trainable", "loss", "loss_mask"), ("mask", "masked")
PARTLY_LEARNED = ("train_detail", "training_detail")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
READ = ("role", "from", "content", "value", "tool_calls", "function_call", *REASONING, *LEARNED, *MASKED, *PARTLY_LEARNED, *MEDIA)
FLAGS = {"true": True, "false": False, "1": True, "0": False}
MAX_DEPTH = 64  # of tool arguments and schemas


def read_message(raw: Any, where: str) -> tuple[dict[str, Any], bool]:
    """Return the message as a template reads it, and whether the model learns to write it.

    Keys that templates may know and that are not read here stay. SampleError names the key.
    """
    if not isinstance(raw, Mapping):
        raise SampleError(f"{where} must be an object with role and content, not {_kind(raw)}")
    given = {key: value for key, value in raw.items() if value is not None}
    named = _only(given, ("role", "from"), where)
    role = ROLES.get(named.strip().lower()) if isinstance(named, str) else None
    if role is None:
        raise SampleError(f"{where} has the role {named!r}; known: {', '.join(ROLES)}")
    message = {key: value for key, value in given.items() if key not in READ and _is_plain(value)}
    message = {"role": role, "content": "", **message}
    for key in MEDIA:
        if given.get(key):
            raise SampleError(f"{where}.{key} is not text; only text can be learnt")
    content = _only(given, ("content", "value"), where)
    if isinstance(named, str) and named.strip().lower() == "function_call":
        given["tool_calls"], content = content, None
    calls = _only(given, ("tool_calls", "function_call"), where)
    if calls:
        message["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    thought = _only(given, REASONING, where)
    if thought:
        message["reasoning_content"] = _text(thought, f"{where}.reasoning_content")
    if content is None and not calls and not thought:
        raise SampleError(f"{where} has no content")
    message["content"] = "" if content is None else _text(content, f"{where}.content")
    learned = _learned(given, role, where)
    if learned and not (message["content"].strip() or calls or thought):
        raise SampleError(f"{where} is an empty answer, so there is nothing to learn")
    return message, learned


def flag(value: Any, where: str) -> bool:
    """Return a yes or no that data files write as true, 1 or "true"."""
    found = _flag(value)
    if found is None:
        raise SampleError(f"{where} = {value!r} must be 0 or 1, true or false")
    return found


def is_flag(value: Any) -> bool:
    """Return whether `flag` reads the value."""
    return _flag(value) is not None


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else FLAGS.get(str(int(value) if value in (0.0, 1.0) else value).strip().lower())


def parse_json(value: Any, where: str) -> Any:
    """Return what a JSON text holds, and any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"{where} must be JSON ({error})") from None


def read_tools(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
    """Return the functions that a row describes, or None."""
    raw = row.get("tools")
    if isinstance(raw, str) and not raw.strip():
        return None
    found = parse_json(raw, "tools") or []
    found = [found] if isinstance(found, Mapping) else found
    if not isinstance(found, (list, tuple)):
        raise SampleError("tools must be a list of functions")
    tools = tuple(parse_json(tool, f"tools[{i}]") for i, tool in enumerate(found))
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise SampleError(f"tools[{i}] must be an object that describes a function")
    return tools or None


def read_history(history: Any) -> list[tuple[str, str]]:
    """Return the earlier turns of an Alpaca row, each as role and text."""
    turns = []
    for i, pair in enumerate(history if isinstance(history, (list, tuple)) else [history]):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise SampleError(f"history[{i}] must be a pair of question and answer")
        turns += [("user", read_string(pair[0], f"history[{i}][0]")), ("assistant", read_string(pair[1], f"history[{i}][1]"))]
    return turns


def read_string(value: Any, column: str) -> str:
    """Return the text of a column, or raise SampleError."""
    if not isinstance(value, str):
        raise SampleError(f"{column} must be a string, not {'nothing' if value is None else type(value).__name__}")
    return value


def check_text(value: Any, where: str, depth: int = 0) -> None:
    """Raise SampleError for text that no tokenizer takes, wherever it lies in `value`."""
    if isinstance(value, str):
        if "\0" in value:
            raise SampleError(f"{where} holds a NUL character")
        if not value.isascii():
            if any(mark in value for mark in MARKS):
                raise SampleError(f"{where} holds U+FDD0 or U+FDD1, which Unicode keeps for use inside programs")
            try:
                value.encode()
            except UnicodeEncodeError as error:
                text = f"{where} holds half a surrogate pair ({value[error.start]!r} at character {error.start + 1})"
                raise SampleError(text) from None
    elif depth > MAX_DEPTH:
        raise SampleError(f"{where} is nested more than {MAX_DEPTH} levels deep")
    elif isinstance(value, Mapping):
        for key, part in value.items():
            check_text(key, f"a key of {where}", depth + 1)
            check_text(part, f"{where}.{key}", depth + 1)
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            check_text(part, f"{where}[{i}]", depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise SampleError(f"{where} is a number too large for JSON")
    elif not (value is None or isinstance(value, (bool, int, float))):
        raise SampleError(f"{where} must be plain JSON, not {_kind(value)}")


def _only(given: Mapping[str, Any], names: tuple[str, ...], where: str) -> Any:
    """Return the value of the one key that is there, or None; equal values may stand under several."""
    found = [given[name] for name in names if name in given]
    if any(value != found[0] for value in found):
        raise SampleError(f"{where} has different values under {' and '.join(name for name in names if name in given)}")
    return found[0] if found else None


def _text(value: Any, where: str) -> str:
    """Return text, or the joined texts of a list of parts."""
    if isinstance(value, str):
        return value
    parts = [value] if isinstance(value, Mapping) else value
    if not isinstance(parts, (list, tuple)):
        raise SampleError(f"{where} must be text, not {_kind(value)}")
    return "".join(_part(part, f"{where}[{i}]") for i, part in enumerate(parts))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise SampleError(f"{where} must be text, not {_kind(part)}")
    kind, text = part.get("type", "text"), part.get("text")
    others = [key for key, value in part.items() if key not in ("type", "text", "cache_control") and value not in (None, [], "")]
    if kind != "text" or not isinstance(text, str) or others:
        raise SampleError(f"{where} is a part of type {kind!r} with {', '.join(map(str, part))}; only text can be learnt")
    return text


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Return calls in the one form that templates know, with arguments as an object."""
    raw = parse_json(value, where)
    calls = []
    for i, call in enumerate([raw] if isinstance(raw, Mapping) else raw if isinstance(raw, (list, tuple)) else [raw]):
        here = f"{where}[{i}]"
        inner = call.get("function", call) if isinstance(call, Mapping) else call
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
            raise SampleError(f"{here} must name a function")
        arguments = parse_json(inner.get("arguments") or {}, f"{here}.arguments")
        if not isinstance(arguments, Mapping):
            raise SampleError(f"{here}.arguments must be an object, not {_kind(arguments)}")
        known = {key: call[key] for key in ("id",) if call.get(key) is not None}
        calls.append({**known, "type": "function", "function": {"name": inner["name"], "arguments": dict(arguments)}})
    return calls


def _learned(given: Mapping[str, Any], role: str, where: str) -> bool:
    """Return whether the message carries loss: an assistant's does, unless a key says otherwise."""
    for key in PARTLY_LEARNED:
        if given.get(key):
            raise SampleError(f"{where}.{key} marks parts of a message; a message is learnt as a whole or not at all")
    said = {key: flag(given[key], f"{where}.{key}") for key in LEARNED if key in given}
    said |= {key: not flag(given[key], f"{where}.{key}") for key in MASKED if key in given}
    if len(set(said.values())) > 1:
        raise SampleError(f"{where} is to be learnt and not to be learnt ({', '.join(said)})")
    if role != "assistant" and any(said.values()):
        raise SampleError(f"{where}.{next(iter(said))} asks to learn a {role} message; only an assistant's can be learnt")
    return role == "assistant" and all(said.values())


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, list, dict))


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
