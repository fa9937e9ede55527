"""Turn a raw row of any supported format into a Conversation or a Document.

- messages: `{"messages": [{"role", "content"}, ...]}`, or `conversations` with from/value.
- prompt_completion: `{"prompt", "completion"}`, both text or lists of messages.
- alpaca: `{"instruction", "input", "output"}`: a chat if there is a template, else Stanford's
  prompt.
- text: `{"text"}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.data.messages import MEDIA, check_text, flag, parse_json, read_message
from engine.dialogue.conversation import Conversation, Document, SampleError
from engine.errors import InputError

FORMATS = {  # format -> columns that identify it, most specific first
    "messages": (("messages",), ("conversations",)),
    "prompt_completion": (("prompt", "completion"),),
    "alpaca": (("instruction", "output"),),
    "text": (("text",),),
}
ALPACA_HEAD = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
SYSTEM = ("system", "system_prompt")
GOOD = ("label", "kto_tag")  # KTO's verdict on an answer
Messages = list[tuple[dict[str, Any], bool]]


class RowFormat:
    """Read rows of one format, which the first readable row reveals unless the config names it."""

    def __init__(self, wanted: str, columns: Mapping[str, str], has_template: bool) -> None:
        """columns: the user's names of our columns. has_template: alpaca becomes a chat."""
        self._wanted, self._columns, self._has_template = wanted, columns, has_template
        self._format: str | None = None

    def read(self, name: str, row: Any) -> Conversation | Document:
        """Return what a template or the tokenizer takes. InputError, which names the row, if it is bad."""
        if not isinstance(row, Mapping):
            raise InputError(name, row, "must be an object with named columns")
        try:
            renamed = self._renamed(row)
            if self._format is None:
                self._format = detect_format(renamed, self._wanted, self._columns, name)
            return self._read(renamed)
        except KeyError as error:
            raise InputError(name, sorted(map(str, row)), f"column {error} is missing, but the first sample has it") from None
        except SampleError as error:
            raise InputError(name, dict(row), str(error)) from None
        except RecursionError:
            raise InputError(name, type(row).__name__, "is nested too deeply") from None

    def _renamed(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self._columns:
            return row
        missing = [theirs for theirs in self._columns.values() if theirs not in row]
        if missing:
            raise SampleError(f"has no column {missing[0]!r}, which data.columns names")
        return {**row, **{ours: row[theirs] for ours, theirs in self._columns.items()}}

    def _read(self, row: Mapping[str, Any]) -> Conversation | Document:
        if self._format == "text":
            return _document("", row["text"], "prompt", "text")
        for column in GOOD:
            value = row.get(column)
            if isinstance(value, (bool, str)) and str(value).lower() in ("true", "false") and not flag(value, column):
                raise SampleError(f"{column} is false, so its answer is a bad one (KTO); data.bad_rows=skip leaves such rows out")
        for column in MEDIA:
            if row.get(column):
                raise SampleError(f"{column} is not text; only text can be learnt")
        read = {"messages": _messages, "prompt_completion": _prompt_completion, "alpaca": self._alpaca}
        return read[self._format](row)

    def _alpaca(self, row: Mapping[str, Any]) -> Conversation | Document:
        instruction, output = _string(row["instruction"], "instruction"), row["output"]
        extra = _string(row.get("input") or "", "input")
        history = parse_json(row.get("history") or [], "history")
        if self._has_template:
            user = f"{instruction}\n\n{extra}" if extra else instruction
            turns = [*_history(history), ("user", user), ("assistant", _string(output, "output"))]
            return _conversation(row, [{"role": role, "content": text} for role, text in turns], "turn")
        if history or _system(row):
            raise SampleError("system and history need a chat template: set data.chat_template")
        head = ALPACA_HEAD.format(", paired with an input that provides further context" if extra else "")
        middle = f"### Input:\n{extra}\n\n" if extra else ""
        return _document(f"{head}### Instruction:\n{instruction}\n\n{middle}### Response:\n", output, "instruction", "output")


def detect_format(row: Mapping[str, Any], wanted: str, renamed: Mapping[str, str], where: str) -> str:
    """Return the format that fits these columns, or `wanted` if it is not `auto` and fits.

    renamed: columns that the config names; only formats that read them fit. InputError, naming the
    sample as `where`, if none fits.
    """
    marks = {column for alternatives in FORMATS.values() for needed in alternatives for column in needed}
    named = marks & set(renamed)
    for name, alternatives in FORMATS.items():
        fits = any(all(c in row for c in needed) and named <= set(needed) for needed in alternatives)
        if wanted in ("auto", name) and fits:
            return name
    known = "; ".join(f"{n}: {' or '.join('+'.join(c) for c in alts)}" for n, alts in FORMATS.items())
    hint = "columns of other names: data.columns={prompt: question, completion: answer}"
    if "chosen" in row and "rejected" in row:
        ours = "messages" if isinstance(row["chosen"], list) and not isinstance(row.get("prompt"), list) else "completion"
        hint = f"pairs of chosen and rejected answers; to learn the chosen ones: data.columns={{{ours}: chosen}}"
    raise InputError(where, sorted(map(str, row)), f"columns fit no format (format: {wanted}); known: {known}; {hint}")


def _messages(row: Mapping[str, Any]) -> Conversation:
    name = "conversations" if "conversations" in row and "messages" not in row else "messages"
    return _conversation(row, row[name], name)


def _prompt_completion(row: Mapping[str, Any]) -> Conversation | Document:
    prompt, completion = (_decoded(row[name], name) for name in ("prompt", "completion"))
    if not any(isinstance(value, (list, tuple, Mapping)) for value in (prompt, completion)):
        if _system(row):
            raise SampleError("system needs messages: plain prompts have no place for it")
        return _document(prompt, completion, "prompt", "completion")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    context, answers = (
        [message for message, _ in _read_list(prompt, "prompt", False)],
        _read_list(completion, "completion", False),
    )
    if context and [message for message, _ in answers[: len(context)]] == context:
        raise SampleError("completion repeats the prompt; to learn such whole dialogues: data.columns={messages: <its column>}")
    return _made(row, [*((message, False) for message in context), *answers])


def _decoded(value: Any, name: str) -> Any:
    """Return lists that a table holds as JSON text; any other text is text."""
    if isinstance(value, str) and value.startswith("[{") and value.endswith("}]"):
        try:
            return parse_json(value, name)
        except SampleError:
            return value
    return value


def _conversation(row: Mapping[str, Any], raw: Any, where: str) -> Conversation:
    messages = _read_list(parse_json(raw, where), where, True)
    if row.get("loss_mask") is not None:
        mask = parse_json(row["loss_mask"], "loss_mask")
        if not isinstance(mask, (list, tuple)) or len(mask) != len(messages):
            raise SampleError(f"loss_mask must be a list of {len(messages)} values, one for each message")
        said = [flag(value, f"loss_mask[{i}]") for i, value in enumerate(mask)]
        wrong = next((i for i, ((m, _), yes) in enumerate(zip(messages, said)) if yes and m["role"] != "assistant"), None)
        if wrong is not None:
            raise SampleError(f"loss_mask[{wrong}] asks to learn a {messages[wrong][0]['role']} message")
        messages = [(message, learned and yes) for (message, learned), yes in zip(messages, said)]
    return _made(row, messages)


def _read_list(raw: Any, where: str, refuse_empty: bool) -> Messages:
    if isinstance(raw, Mapping) and raw and all(isinstance(part, (list, tuple)) for part in raw.values()):
        if len({len(part) for part in raw.values()}) != 1:
            raise SampleError(f"{where} must hold lists of one length")
        raw = [dict(zip(raw, parts)) for parts in zip(*raw.values())]  # a table's form of a list of objects
    if not isinstance(raw, (list, tuple)) or (refuse_empty and not raw):
        raise SampleError(f"{where} must be a non-empty list of {{role, content}}")
    return [read_message(message, f"{where}[{i}]") for i, message in enumerate(raw)]


def _made(row: Mapping[str, Any], messages: Messages) -> Conversation:
    system = _system(row)
    if system and messages and messages[0][0]["role"] in ("system", "developer"):
        if messages[0][0]["content"] != system:
            raise SampleError("has a system text of its own and another one among its messages")
    elif system:
        messages = [({"role": "system", "content": system}, False), *messages]
    if not any(message["role"] == "assistant" for message, _ in messages):
        raise SampleError("has no assistant message, so there is nothing to learn")
    if not any(learned for _, learned in messages):
        raise SampleError("has no assistant message that is to be learnt: all carry weight 0, or belong to the prompt")
    conversation = Conversation(tuple(m for m, _ in messages), tuple(learned for _, learned in messages), _tools(row))
    check_text(conversation.messages, "messages")
    check_text(conversation.tools, "tools")
    return conversation


def _document(prompt: Any, completion: Any, prompt_name: str, name: str) -> Document:
    document = Document(_string(prompt, prompt_name), _string(completion, name))
    if not document.completion.strip():
        raise SampleError(f"{name} is empty, so there is nothing to learn")
    check_text(document.prompt, prompt_name)
    check_text(document.completion, name)
    return document


def _system(row: Mapping[str, Any]) -> str:
    texts = {_string(row[name], name) for name in SYSTEM if row.get(name)}
    if len(texts) > 1:
        raise SampleError(f"has different texts under {' and '.join(SYSTEM)}")
    return next(iter(texts), "")


def _history(history: Any) -> list[tuple[str, str]]:
    turns = []
    for i, pair in enumerate(history if isinstance(history, (list, tuple)) else [history]):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise SampleError(f"history[{i}] must be a pair of question and answer")
        turns += [("user", _string(pair[0], f"history[{i}][0]")), ("assistant", _string(pair[1], f"history[{i}][1]"))]
    return turns


def _tools(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
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


def _string(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise SampleError(f"{column} must be a string, not {'nothing' if value is None else type(value).__name__}")
    return value
