"""Turn a raw row of any supported format into a Conversation or a Document.

One format holds for all rows of a source: most of its first rows decide, so that an odd one among
them does not.

- messages: `{"messages": [{"role", "content"}, ...]}`, or `conversations` with from/value.
- prompt_completion: `{"prompt", "completion"}`, both text or lists of messages.
- alpaca: `{"instruction", "input", "output"}`: a chat if there is a template, else Stanford's
  prompt.
- text: `{"text"}`.
- preference: `{"prompt", "chosen", "rejected"}`, or the prompt in both answers; never guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from engine.config.preference_section import PREFERENCE
from engine.data.messages import MEDIA, check_text, flag, is_flag, parse_json, read_history, read_message, read_string, read_tools
from engine.dialogue.conversation import AnswerPair, Conversation, Document, SampleError
from engine.dialogue.preference_pair import COLUMNS, read_pair
from engine.errors import InputError

FORMATS = {  # format -> columns that identify it, most specific first
    "messages": (("messages",), ("conversations",)),
    "prompt_completion": (("prompt", "completion"),),
    "alpaca": (("instruction", "output"),),
    "text": (("text",),),
    "preference": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
}
OPTIONAL = {  # format -> further columns that it reads
    "messages": ("system", "tools", "label"), "prompt_completion": ("system", "tools", "label"),
    "alpaca": ("input", "system", "history", "tools", "label"), "text": (), "preference": ("system", "tools"),
}  # fmt: skip
ALIASES = {"conversations": "messages", "system_prompt": "system", "kto_tag": "label"}
ALPACA_HEAD = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
SYSTEM = ("system", "system_prompt")
GOOD = ("label", "kto_tag")  # KTO's verdict on an answer
LONG = 20  # characters of a prompt that no completion repeats by chance
REPEATED = "a completion that repeats its prompt is learnt from behind it"
UNRENDERED = "prompts and completions are plain text, for which the chat template is not used"
Messages = list[tuple[dict[str, Any], bool]]


class RowFormat:
    """Read rows of one format: the config's, or the one that most of the first rows have."""

    def __init__(self, wanted: str, columns: Mapping[str, str], has_template: bool) -> None:
        """columns: the user's names of our columns. has_template: alpaca becomes a chat."""
        self._wanted, self._columns, self._has_template = wanted, columns, has_template
        self._format: str | None = None
        self._numbers_judge = self._repeats = False
        self._unseen = {ours: theirs for ours, theirs in columns.items() if not _is_mark(ours)}

    def decide(self, rows: Iterable[tuple[str, Any]]) -> None:
        """Settle what rows tell only together, from the names and columns of the first ones.

        That is their format, whether a number under `label` is a verdict, and whether completions
        repeat their prompts. InputError for data.columns that cannot be meant.
        """
        found = [pair for name, row in rows if (pair := self._vote(name, row))]
        if not found:
            return
        format = Counter(format for format, _ in found).most_common(1)[0][0]
        self._refuse_columns(format)
        fitting = [row for vote, row in found if vote == format]
        labels = [row["label"] for row in fitting if row.get("label") is not None]
        self._numbers_judge = format == "prompt_completion" and all(is_flag(value) for value in labels)
        pairs = [(row["prompt"], row["completion"]) for row in fitting] if format == "prompt_completion" else []
        pairs = [pair for pair in pairs if all(isinstance(text, str) for text in pair)]
        self._repeats = all(_repeats(*pair) for pair in pairs) and any(len(prompt.strip()) >= LONG for prompt, _ in pairs)
        self._format = format

    def read(self, name: str, row: Any) -> Conversation | Document | AnswerPair:
        """Return what a template or the tokenizer takes. InputError, which names the row, if it is bad."""
        if not isinstance(row, Mapping):
            hint = "; a list of rows belongs in a .json file" if isinstance(row, list) else ""
            raise InputError(name, row, f"must be an object with named columns{hint}")
        try:
            renamed = self._renamed(row)
            if self._format is None:
                detect_format(renamed, self._wanted, self._columns, name)
                self.decide([(name, row)])
            return self._read(renamed)
        except KeyError as error:
            why = f"column {error} is missing, but most of the first rows are of the format {self._format}"
            raise InputError(name, sorted(map(str, row)), why) from None
        except SampleError as error:
            raise InputError(name, dict(row), str(error)) from None
        except RecursionError:
            raise InputError(name, type(row).__name__, "is nested too deeply") from None

    def refuse_unseen(self) -> None:
        """Raise InputError if no row that was read has a column that the config names."""
        for ours, theirs in self._unseen.items():
            raise InputError("data.columns", dict(self._columns), f"no row has a column {theirs!r}, so {ours} is never there")

    def _vote(self, name: str, row: Any) -> tuple[str, Mapping[str, Any]] | None:
        """Return the row's format and its columns under our names; None for a bad row."""
        if not isinstance(row, Mapping):
            return None
        try:
            renamed = self._renamed(row)
            return detect_format(renamed, self._wanted, self._columns, name), renamed
        except (SampleError, InputError):
            return None

    def _refuse_columns(self, format: str) -> None:
        """Raise InputError for a name without effect, and for a column that would be read twice."""
        read = {column for needed in FORMATS[format] for column in needed} | set(OPTIONAL[format])
        for ours, theirs in self._columns.items():
            other = ALIASES.get(theirs, theirs)
            if ours not in read:
                raise InputError("data.columns", dict(self._columns), f"the format {format} reads no {ours}; leave it out")
            if other in read and other != ours and other not in self._columns:
                twice = f"{theirs!r} would be read as {ours} and as {other}; say which column is the {other}"
                raise InputError("data.columns", dict(self._columns), twice)

    def _renamed(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self._columns:
            return row
        missing = [theirs for ours, theirs in self._columns.items() if theirs not in row and _is_mark(ours)]
        if missing:
            raise SampleError(f"has no column {missing[0]!r}, which data.columns names")
        self._unseen = {ours: theirs for ours, theirs in self._unseen.items() if theirs not in row}
        others = {name: value for name, value in row.items() if name not in self._columns}
        return {**others, **{ours: row[theirs] for ours, theirs in self._columns.items() if theirs in row}}

    def _read(self, row: Mapping[str, Any]) -> Conversation | Document | AnswerPair:
        if self._format == "text":
            return _document("", row["text"], "prompt", "text")
        for column in GOOD:
            value = row.get(column)
            is_word = isinstance(value, bool) or str(value).strip().lower() in ("true", "false")
            judges = value is not None and (is_word or column == "kto_tag" or self._numbers_judge)
            if judges and is_flag(value) and not flag(value, column):
                why = f"{column} is {str(value).lower()}, so its answer is a bad one (KTO)"
                raise SampleError(f"{why}; data.bad_rows=skip leaves such rows out; rename the column if it is no verdict")
        for column in MEDIA:
            if row.get(column):
                raise SampleError(f"{column} is not text; only text can be learnt")
        if self._format == PREFERENCE:
            decoded = {name: _decoded(value, name) if name in COLUMNS else value for name, value in row.items()}
            return read_pair(decoded, self._prompt_completion)
        read = {"messages": _messages, "prompt_completion": self._prompt_completion, "alpaca": self._alpaca}
        return read[self._format](row)

    def _prompt_completion(self, row: Mapping[str, Any]) -> Conversation | Document:
        prompt, completion = (_decoded(row[name], name) for name in ("prompt", "completion"))
        if any(isinstance(value, (list, tuple, Mapping)) for value in (prompt, completion)):
            return _dialogue(row, prompt, completion)
        if _system(row):
            raise SampleError("system needs messages: plain prompts have no place for it")
        notes = (UNRENDERED,) if self._has_template else ()
        if self._repeats and _repeats(prompt, completion):
            return replace(_document(prompt, completion[len(prompt) :], "prompt", "completion"), notes=(REPEATED, *notes))
        return replace(_document(prompt, completion, "prompt", "completion"), notes=notes)

    def _alpaca(self, row: Mapping[str, Any]) -> Conversation | Document:
        instruction, output = read_string(row["instruction"], "instruction"), row["output"]
        extra = read_string(row.get("input") or "", "input")
        history = parse_json(row.get("history") or [], "history")
        if self._has_template:
            user = f"{instruction}\n\n{extra}" if extra else instruction
            turns = [*read_history(history), ("user", user), ("assistant", read_string(output, "output"))]
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
        if fits and (wanted == name or (wanted == "auto" and name != PREFERENCE)):
            return name
    known = "; ".join(f"{n}: {' or '.join('+'.join(c) for c in alts)}" for n, alts in FORMATS.items())
    hint = "columns of other names: data.columns={prompt: question, completion: answer}"
    if "chosen" in row and "rejected" in row:
        ours = "messages" if isinstance(row["chosen"], list) and not isinstance(row.get("prompt"), list) else "completion"
        hint = f"data.format={PREFERENCE} learns from the pairs; to learn the chosen ones alone: data.columns={{{ours}: chosen}}"
    raise InputError(where, sorted(map(str, row)), f"columns fit no format (format: {wanted}); known: {known}; {hint}")


def _messages(row: Mapping[str, Any]) -> Conversation:
    name = "conversations" if "conversations" in row and "messages" not in row else "messages"
    return _conversation(row, row[name], name)


def _dialogue(row: Mapping[str, Any], prompt: Any, completion: Any) -> Conversation:
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
    conversation = Conversation(tuple(m for m, _ in messages), tuple(learned for _, learned in messages), read_tools(row))
    check_text(conversation.messages, "messages")
    check_text(conversation.tools, "tools")
    return conversation


def _document(prompt: Any, completion: Any, prompt_name: str, name: str) -> Document:
    document = Document(read_string(prompt, prompt_name), read_string(completion, name))
    if not document.completion.strip():
        raise SampleError(f"{name} is empty, so there is nothing to learn")
    check_text(document.prompt, prompt_name)
    check_text(document.completion, name)
    return document


def _system(row: Mapping[str, Any]) -> str:
    texts = {read_string(row[name], name) for name in SYSTEM if row.get(name)}
    if len(texts) > 1:
        raise SampleError(f"has different texts under {' and '.join(SYSTEM)}")
    return next(iter(texts), "")


def _is_mark(column: str) -> bool:
    """Return whether rows of some format must have the column."""
    return any(column in needed for alternatives in FORMATS.values() for needed in alternatives)


def _repeats(prompt: Any, completion: Any) -> bool:
    """Return whether the completion begins with its prompt, and goes on behind it."""
    texts = isinstance(prompt, str) and isinstance(completion, str) and prompt.strip()
    return bool(texts) and completion.startswith(prompt) and bool(completion[len(prompt) :].strip())
