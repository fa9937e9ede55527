"""Turn a sample of any supported format into text, and mark the spans the model learns to write.

- messages: `{"messages": [{"role", "content"}, ...]}`, or `conversations` with from/value. The chat
  template renders it, and assistant turns carry loss.
- prompt_completion: `{"prompt", "completion"}`; the completion carries loss.
- alpaca: `{"instruction", "input", "output"}`, rendered as a chat if there is a template, else with
  Stanford's prompt. The output carries loss.
- text: `{"text"}`; everything carries loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.system.user_path import user_path

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORMATS = {  # format -> columns that identify it, most specific first
    "messages": (("messages",), ("conversations",)),
    "prompt_completion": (("prompt", "completion"),),
    "alpaca": (("instruction", "output"),),
    "text": (("text",),),
}
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
MAX_CHARACTERS = 10_000_000  # per sample: about two million tokens, more than any card holds
TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2")
ALPACA_HEAD = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"


@dataclass(frozen=True)
class TargetText:
    """Hold a text and the character ranges [start, end) that carry loss."""

    text: str
    spans: tuple[tuple[int, int], ...]


class SampleError(Exception):
    """Say what is wrong with one sample; the reader adds the sample's name."""


def detect_format(columns: Mapping[str, Any], wanted: str, where: str) -> str:
    """Return the format that fits these columns, or `wanted` if it is not `auto` and fits.

    InputError, naming the sample as `where`, if none fits.
    """
    for name, alternatives in FORMATS.items():
        if wanted in ("auto", name) and any(all(c in columns for c in needed) for needed in alternatives):
            return name
    known = "; ".join(f"{n}: {' or '.join('+'.join(c) for c in alts)}" for n, alts in FORMATS.items())
    raise InputError(where, sorted(columns), f"columns fit no format (format: {wanted}); known: {known}")


def chat_template(tokenizer: Any, wanted: str | None) -> str | None:
    """Return the Jinja text of the template: the tokenizer's own, `chatml`, or a file's content.

    InputError for a name that is none of these.
    """
    if wanted is None:
        return tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else tokenizer.get_chat_template()
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


class Renderer:
    """Turn samples of one format into TargetTexts, with one tokenizer's special tokens.

    `render` is the method for the format; it raises SampleError for a bad sample.
    """

    def __init__(self, tokenizer: Any, format_name: str, template: str | None) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._bos = tokenizer.bos_token if _adds_bos(tokenizer) else ""
        self._eos = tokenizer.eos_token or ""
        methods: dict[str, Callable[[Mapping[str, Any]], list[TargetText]]] = {
            "messages": self._messages,
            "prompt_completion": self._prompt_completion,
            "alpaca": self._alpaca,
            "text": self._text,
        }
        self.render = methods[format_name]

    def _text(self, sample: Mapping[str, Any]) -> list[TargetText]:
        text = _string(sample, "text")
        return [self._plain("", text)]

    def _prompt_completion(self, sample: Mapping[str, Any]) -> list[TargetText]:
        if isinstance(sample["prompt"], list) and isinstance(sample["completion"], list):
            return self._messages({**sample, "messages": [*sample["prompt"], *sample["completion"]]})
        return [self._plain(_string(sample, "prompt"), _string(sample, "completion"))]

    def _alpaca(self, sample: Mapping[str, Any]) -> list[TargetText]:
        instruction, output = _string(sample, "instruction"), _string(sample, "output")
        extra = sample.get("input") or ""
        if self._template is not None:
            user = f"{instruction}\n\n{extra}" if extra else instruction
            turns = [{"role": "user", "content": user}, {"role": "assistant", "content": output}]
            return self._messages({"messages": turns})
        head = ALPACA_HEAD.format(", paired with an input that provides further context" if extra else "")
        middle = f"### Input:\n{extra}\n\n" if extra else ""
        return [self._plain(f"{head}### Instruction:\n{instruction}\n\n{middle}### Response:\n", output)]

    def _messages(self, sample: Mapping[str, Any]) -> list[TargetText]:
        messages = _normalised(sample)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if not turns:
            raise SampleError("has no assistant message, so there is nothing to learn")
        extra = {"tools": sample["tools"]} if sample.get("tools") else {}
        pieces = [self._turn(messages, i, extra) for i in turns]
        whole = self._apply(messages, False, extra)
        if all(whole.startswith(text) for text, _ in pieces):
            return [TargetText(whole, tuple((start, len(text)) for text, start in pieces))]
        # Some templates write earlier turns differently once later ones follow: reasoning models
        # drop their thoughts. One text per assistant turn then shows the model exactly what it sees
        # when it has to write that turn.
        return [TargetText(text, ((start, len(text)),)) for text, start in pieces]

    def _turn(self, messages: list[dict[str, Any]], i: int, extra: dict[str, Any]) -> tuple[str, int]:
        prompt = self._apply(messages[:i], True, extra)
        text = self._apply(messages[: i + 1], False, extra)
        if not text.startswith(prompt):
            raise SampleError("the chat template begins assistant messages differently from its generation prompt")
        return text, len(prompt)

    def _apply(self, messages: list[dict[str, Any]], generate: bool, extra: dict[str, Any]) -> str:
        if self._template is None:
            raise InputError("data.chat_template", None, "the tokenizer has no chat template; set chatml or a Jinja file")
        options = {"chat_template": self._template, "add_generation_prompt": generate, "tokenize": False, **extra}
        try:
            text = self._tokenizer.apply_chat_template(messages, **options)
        except MemoryError:
            raise
        except Exception as error:  # a template raises TemplateError with any message
            raise SampleError(f"the chat template refused it: {error}") from error
        if len(text) > MAX_CHARACTERS:
            raise SampleError(f"the chat template makes {len(text):,} characters of it; at most {MAX_CHARACTERS:,} are allowed")
        return text

    def _plain(self, prompt: str, completion: str) -> TargetText:
        start = len(self._bos) + len(prompt)
        text = f"{self._bos}{prompt}{completion}{self._eos}"
        return TargetText(text, ((start, len(text)),))


def _normalised(sample: Mapping[str, Any]) -> list[dict[str, Any]]:
    raw = sample.get("messages", sample.get("conversations"))
    if not isinstance(raw, (list, tuple)) or not raw or not all(isinstance(m, Mapping) for m in raw):
        raise SampleError("messages must be a non-empty list of {role, content}")
    messages = []
    for message in raw:
        if "from" in message and "value" in message:
            message = {"role": SHAREGPT_ROLES.get(message["from"], message["from"]), "content": message["value"]}
        content = message.get("content")
        if not isinstance(message.get("role"), str) or not (isinstance(content, (str, list)) or message.get("tool_calls")):
            raise SampleError("every message needs a role and a content (text, or a list of parts)")
        messages.append({key: value for key, value in message.items() if value is not None})
    return messages


def _string(sample: Mapping[str, Any], column: str) -> str:
    value = sample.get(column)
    if not isinstance(value, str):
        raise SampleError(f"{column} must be a string, not {type(value).__name__}")
    return value


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
