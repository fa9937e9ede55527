"""Turn a conversation into text, and mark the spans the model learns to write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.conversation import Conversation, Document, SampleError
from engine.errors import InputError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_CHARACTERS = 10_000_000  # per sample: about two million tokens, more than any card holds
TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2")


@dataclass(frozen=True)
class TargetText:
    """Hold a text and the character ranges [start, end) that carry loss."""

    text: str
    spans: tuple[tuple[int, int], ...]


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
            return Path(wanted).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        pass
    kinds = ", ".join(TEMPLATE_SUFFIXES)
    raise InputError("data.chat_template", wanted, f"allowed: none (the tokenizer's own), chatml, or a Jinja file ({kinds})")


class Renderer:
    """Turn samples into TargetTexts, with one tokenizer's special tokens."""

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._bos = tokenizer.bos_token if _adds_bos(tokenizer) else ""
        self._eos = tokenizer.eos_token or ""

    def render(self, sample: Conversation | Document) -> list[TargetText]:
        """Return the sample's texts; SampleError if the template refuses it."""
        if isinstance(sample, Document):
            return [self._plain(sample.prompt, sample.completion)]
        messages = [dict(message) for message in sample.messages]
        extra = {"tools": list(sample.tools)} if sample.tools else {}
        pieces = [self._turn(messages, i, extra) for i, learned in enumerate(sample.learned) if learned]
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


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
