"""Name ways out of a refused conversation, and none that has not been tried.

Each candidate is rendered: another value of a switch, the conversation without what the template
leaves out, an answer with a thought, ChatML. Only those that succeed are named. Where none does,
leaving out such rows is named, which needs no trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from engine.dialogue.conversation import Conversation, SampleError
from engine.dialogue.left_out import LeftOutError, shape
from engine.dialogue.templates import CHATML, REASONING, SWITCHES, ChatTemplate, reads, thought_of, with_thought_apart

Remake = Callable[[str, dict[str, Any]], Any]  # template, variables -> Spans
Way = tuple[str, Callable[[], Any]]  # what to do, and a trial of it, which raises SampleError
MAX_TAKEN, MAX_KNOWN = 20, 50  # parts taken out of one conversation, kinds of refusals that are tried
EFFORTS = ("high", "low")
SKIP = "data.bad_rows=skip leaves such rows out"


class OtherPromptError(SampleError):
    """Say that a generation prompt is not what the template writes. is_of_thoughts: a thought may be why."""

    def __init__(self, text: str, is_of_thoughts: bool = False) -> None:
        super().__init__(text)
        self.is_of_thoughts = is_of_thoughts


def with_way_out(
    error: SampleError, conversation: Conversation, template: ChatTemplate, remake: Remake, known: dict[Any, str]
) -> SampleError:
    """Return the error with the ways out that work. known: those of earlier conversations."""
    tagged = tuple("think>" in str(message.get("content")) for message in conversation.messages)
    dialogue = shape([conversation.messages, conversation.tools]), conversation.learned
    kind = (type(error), getattr(error, "part", None), tagged, dialogue)
    if kind not in known and len(known) < MAX_KNOWN:
        found = [name for name, trial in _ways(error, conversation, template, remake) if _works(trial)]
        known[kind] = ", or ".join(found) or SKIP
    return SampleError(f"{error}; {known.get(kind, SKIP)}")


def _ways(error: SampleError, conversation: Conversation, template: ChatTemplate, remake: Remake) -> Iterator[Way]:
    """Yield the candidates, the closest to what the author of the data wanted first."""
    same = remake(template.text, template.variables)
    if isinstance(error, OtherPromptError) and error.is_of_thoughts:
        for name in reads(template.text, SWITCHES)[:1] or SWITCHES[: "<think>" in template.text]:
            for value in (False, True):
                other = {**template.variables, name: value}
                if template.variables.get(name) is not value:
                    made = remake(template.text, other)
                    yield f"set data.template_kwargs.{name}={str(value).lower()}", lambda made=made: made.tried(conversation)
        for effort in EFFORTS if reads(template.text, ["reasoning_effort"]) else ():
            made = remake(template.text, {**template.variables, "reasoning_effort": effort})
            yield f"set data.template_kwargs.reasoning_effort={effort}", lambda made=made: made.tried(conversation)
        if (thinking := _thinking(conversation)) != conversation:
            yield "give each answer its thought (reasoning_content)", lambda: same.tried(thinking)
    if isinstance(error, LeftOutError):
        yield ("take them out" if error.index is None else "take it out"), lambda: _taken_out(error, conversation, same)
        if error.part.startswith("tool_calls"):
            yield "take calls and their results out", lambda: same.tried(_without_calls(conversation))
    if template.text != CHATML:
        yield "set data.chat_template=chatml", lambda: remake(CHATML, {}).tried(conversation)


def _works(trial: Callable[[], Any]) -> bool:
    try:
        return bool(trial())
    except SampleError:
        return False


def _taken_out(error: LeftOutError, conversation: Conversation, spans: Any) -> Any:
    """Try the conversation without the part, and without other such parts that are found then."""
    part = error.part.partition("[")[0]
    for _ in range(MAX_TAKEN):
        conversation = _without(conversation, error)
        try:
            return spans.tried(conversation)
        except LeftOutError as other:
            if other.part.partition("[")[0] != part:
                raise
            error = other
    raise error


def _without(conversation: Conversation, error: LeftOutError) -> Conversation:
    """Return the conversation without the part: a message goes with its last part."""
    if error.index is None:
        return replace(conversation, tools=None)
    name, messages = error.part.partition("[")[0], list(conversation.messages)
    message = dict(messages[error.index])
    if name in REASONING:
        message = {key: value for key, value in with_thought_apart(message).items() if key not in REASONING}
    elif name == "content" and not message.get("tool_calls"):
        message = {}
    else:
        message = {**message, name: "" if name == "content" else None}
    if not _says(message):
        kept = [i for i in range(len(messages)) if i != error.index]
        return replace(
            conversation, messages=tuple(messages[i] for i in kept), learned=tuple(conversation.learned[i] for i in kept)
        )
    messages[error.index] = message
    return replace(conversation, messages=tuple(messages))


def _without_calls(conversation: Conversation) -> Conversation:
    plain = [{**message, "tool_calls": None} for message in conversation.messages]
    kept = [i for i, message in enumerate(plain) if message["role"] not in ("tool", "function", "ipython") and _says(message)]
    return Conversation(tuple(plain[i] for i in kept), tuple(conversation.learned[i] for i in kept))


def _thinking(conversation: Conversation) -> Conversation:
    """Return the conversation with a thought for each answer that has none."""
    read = [with_thought_apart(message) for message in conversation.messages]
    added = [{**m, "reasoning_content": "thought"} if m["role"] == "assistant" and not thought_of(m) else m for m in read]
    return replace(conversation, messages=tuple(added))


def _says(message: Mapping[str, Any]) -> bool:
    return bool(message.get("content") or message.get("tool_calls") or thought_of(message))
