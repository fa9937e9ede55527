"""Turn conversations and documents into token ids, as inference does.

What stands before an answer is tokenised apart from the answer, because the model gets the one and
writes the other. A token that would join their ends is therefore never trained.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from engine.config.data_section import DataConfig
from engine.config.trial import HUB_ID
from engine.dialogue.conversation import AnswerPair, Conversation, Document, Encoded, SampleError, TargetText
from engine.dialogue.dialect import any_of
from engine.dialogue.spans import Spans
from engine.dialogue.templates import MARKED, MARKS, RESERVED, ChatTemplate, chat_template, prints_date, reads, tool_template
from engine.dialogue.text_ids import TextIds
from engine.errors import InputError

REVISION = "source_revision"  # attribute of a tokenizer: the hub revision it was loaded from, if one is pinned
ONE_EACH = "the chat template writes earlier turns otherwise, so answers became samples of their own; data.turns=last learns one"
BEFORE, BEHIND = 200, 32  # characters around a border


class Encoder:
    """Render samples, and tokenise what was rendered."""

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        """Raise InputError for a template, a variable of it or a tokenizer that cannot be used."""
        template, for_tools = (find(tokenizer, config.chat_template) for find in (chat_template, tool_template))
        if not tokenizer.is_fast:
            raise InputError("model.path", type(tokenizer).__name__, "must have a fast tokenizer (tokenizer.json)")
        self.template, self.has_template = template, template is not None
        variables, day = dict(config.template_kwargs or {}), date.fromisoformat(config.date) if config.date else None
        _refuse_unread((template or "") + (for_tools or ""), variables)
        self._tokenizer, self._eos = tokenizer, tokenizer.eos_token
        ends = end_texts(tokenizer)
        self.identity = [
            template, variables, printed_day(tokenizer, config), config.turns, ends,
            tokenizer.backend_tokenizer.to_str(), tokenizer.bos_token, tokenizer.eos_token, *([for_tools] if for_tools else []),
        ]  # fmt: skip
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        thoughts = [tag for tag in ("<think>", "</think>") if tag in added and tag in f"{template}{for_tools}"]

        def spans(text: str, variables: dict[str, Any]) -> Spans:
            chat = ChatTemplate(text, variables, day, tokenizer.special_tokens_map, [*ends, *special, *thoughts])
            return Spans(chat, ends, tokenizer.eos_token, special, config.turns, spans)

        self._ends, self._spans = ends, None if template is None else spans(template, variables)
        self._spans_of_tools = spans(for_tools, variables) if for_tools else self._spans
        self._added = any_of(added)
        self._takes_spaces = any(t.lstrip or t.rstrip or t.single_word for t in tokenizer.added_tokens_decoder.values())
        self._prefix = _prefix_ids(tokenizer)
        self._newline = self._ids("\n") if self._ids("\na") != [*self._ids("\n"), *self._ids("a")] else None
        self._ids_of = TextIds(tokenizer, context_free=self._newline is None)

    def render(self, sample: Conversation | Document | AnswerPair) -> list[TargetText]:
        """Return the texts of one sample, or both of a pair. SampleError if they cannot be right."""
        if isinstance(sample, AnswerPair):
            sides = [self.render(sample.chosen), self.render(sample.rejected)]
            if any(len(texts) > 1 for texts in sides):
                raise SampleError("the chat template writes earlier turns otherwise, so an answer of several turns is no pair")
            return [text for texts in sides for text in texts]
        if isinstance(sample, Document):
            return [self._document(sample)]
        spans = self._spans_of_tools if sample.tools else self._spans
        if spans is None:
            raise InputError("data.chat_template", None, "the tokenizer has no chat template; set chatml or a Jinja file")
        texts = shared(spans.answers(sample))
        if len(texts) > 1:
            texts = [replace(text, notes=(*text.notes, ONE_EACH)) for text in texts]
        for token in {token for text in texts if MARKS[0] in text.text for token in MARKED.findall(text.text)}:
            if self._tokenizer.convert_tokens_to_ids(token) in self._as_text(token):
                raise SampleError(f"the tokenizer cannot write {token!r} as text; take it out of the messages")
        return texts

    def encode(self, rendered: Sequence[Sequence[TargetText]]) -> list[list[Encoded]]:
        """Return the ids of each sample's texts. Some texts become several rows, see `_rows`."""
        texts = [text for sample in rendered for text in sample]
        bounds = [self._bounds(text) for text in texts]
        pieces = [_pieces(text.text, cut) for text, cut in zip(texts, bounds)]
        several = [(text, cut) for text, cut in zip(texts, bounds) if len(text.spans) > 1]
        wholes = [text for text, cut in several if not all(self._is_split(text.text, at) for at in cut[1:])]
        ids = iter(self._encode([*(piece for cut in pieces for piece in cut), *((text.text, True) for text in wholes)]))
        apart = [[next(ids) for _ in cut] for cut in pieces]
        whole = dict(zip(map(id, wholes), ids))
        rows = iter([self._rows(text, cut, found, whole.get(id(text))) for text, cut, found in zip(texts, bounds, apart)])
        return [[row for _ in sample for row in next(rows)] for sample in rendered]

    def _rows(self, text: TargetText, bounds: list[int], pieces: list[list[int]], whole: list[int] | None) -> list[Encoded]:
        """Return one row, or more where an answer's context would be tokenised otherwise on its own.

        That is so where the end of an earlier context and the begin of its answer join into one
        token as soon as they are both context.
        """
        starts = range(len(text.spans))
        ids = [] if whole is None else [i for piece in pieces for i in piece]
        if whole is not None and whole != ids:
            contexts = self._encode([(text.text[: text.spans[k][0]], True) for k in starts])
            lengths = [sum(map(len, pieces[: bounds.index(text.spans[k][0])])) for k in starts]
            starts = [k for k in starts if contexts[k] == ids[: lengths[k]]]
        if len(starts) == len(text.spans):
            return [self._row(text, bounds, pieces)]
        first = TargetText(text.text[: text.spans[starts[-1]][1]], tuple(text.spans[k] for k in starts), text.notes, text.is_chat)
        others = TargetText(text.text, tuple(s for k, s in enumerate(text.spans) if k not in starts), text.notes, text.is_chat)
        return [row for part in (first, others) for row in self.encode([[part]])[0]]

    def _row(self, text: TargetText, bounds: list[int], pieces: list[list[int]]) -> Encoded:
        ids: list[int] = []
        is_target: list[bool] = []
        ends = dict(text.spans)
        for start, piece in zip(bounds, pieces):
            count = self._count(text.text[start : ends[start]], piece) if start in ends else 0
            is_target += [True] * count + [False] * (len(piece) - count)
            ids += piece
        if text.is_chat or not self._prefix:
            return Encoded(ids, is_target, text.notes)
        held = len(self._prefix) if ids[: len(self._prefix)] == self._prefix else int(ids[:1] == self._prefix[:1])
        before = [] if held else self._prefix
        return Encoded([*before, *ids], [False] * len(before or ids[:held]) + is_target[held:], text.notes)

    def _count(self, answer: str, ids: list[int]) -> int:
        """Return how many of the ids that begin with `answer` are its own."""
        found = list(self._added.finditer(answer))
        if not found or found[-1].end() != len(answer):
            return len(ids)
        end, at = self._tokenizer.convert_tokens_to_ids(found[-1][0]), -1
        for _ in range(sum(one[0] == found[-1][0] for one in found)):
            at = ids.index(end, at + 1)
        return at + 1

    def _ends_whole(self, answer: str) -> bool:
        """Return whether the answer ends with a token that no text joins."""
        last = [found.end() for found in self._added.finditer(answer)][-1:]
        return last == [len(answer)]

    def _bounds(self, text: TargetText) -> list[int]:
        """Return where the text is cut: at each start, and at each end that no token marks."""
        ends = [end for start, end in text.spans if not self._ends_whole(text.text[start:end])]
        return sorted({0, *(start for start, _ in text.spans), *ends} - {len(text.text)})

    def _is_split(self, text: str, at: int) -> bool:
        """Return True if the tokenizer is sure to split the text there, whatever stands around it.

        Its words are found between the last token that no text joins and some characters further.
        White space alone says nothing there: a word may go on behind it.
        """
        backend, after = self._tokenizer.backend_tokenizer, text[at : at + BEHIND]
        tokens = [found.end() for found in self._added.finditer(text, max(0, at - BEFORE), at)]
        if self._takes_spaces or self._newline is not None or not (tokens and after.strip() and backend.pre_tokenizer):
            return False
        before, whole = text[tokens[-1] : at], text[tokens[-1] : at] + after
        if backend.normalizer:
            before, after, whole = map(backend.normalizer.normalize_str, (before, after, whole))
        ends = {end for _, (_, end) in backend.pre_tokenizer.pre_tokenize_str(whole)}
        return before + after == whole and (not before or len(before) in ends)

    def _document(self, sample: Document) -> TargetText:
        """Return prompt and completion, with an end token unless there is one."""
        text, start = sample.prompt + sample.completion, len(sample.prompt)
        end = start + len(sample.completion.rstrip())
        if not text[start:end].endswith(tuple(self._ends) or "\0"):
            text += self._eos or ""
            end = len(text)
        return TargetText(text, ((start, end),), sample.notes, is_chat=False)

    def _encode(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Return the ids of each text.

        texts: with whether the text is a beginning. Elsewhere no tokenizer may put a space before
        it, so it is tokenised behind a line end. Marked pieces are encoded as text.
        """
        parts = [(MARKED.split(text), first) for text, first in texts]
        plain = [(part, k == 0 and first) for split, first in parts for k, part in enumerate(split[::2])]
        asked = [part if first or self._newline is None else "\n" + part for part, first in plain]
        ids = self._ids_of(asked)
        found = (self._behind(*each) for each in zip(ids, plain))
        pieces = [[self._as_text(part) if k % 2 else next(found) for k, part in enumerate(split)] for split, _ in parts]
        return [split[0] if len(split) == 1 else [i for piece in split for i in piece] for split in pieces]

    def _behind(self, ids: list[int], asked: tuple[str, bool]) -> list[int]:
        part, first = asked
        if first or self._newline is None:
            return ids
        size = len(self._newline)
        return ids[size:] if ids[:size] == self._newline else self._ids(part)

    def _as_text(self, token: str) -> list[int]:
        """Return the ids of a special token's text, as if the tokenizer did not know the token."""
        backend = self._tokenizer.backend_tokenizer
        found = backend.normalizer.normalize_str(token) if backend.normalizer else token
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(found)] if backend.pre_tokenizer else [found]
        return [token.id for word in words for token in backend.model.tokenize(word)]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _pieces(text: str, bounds: list[int]) -> list[tuple[str, bool]]:
    """Return the text cut at the bounds, each piece with whether it is the beginning."""
    return [(text[a:b], a == 0) for a, b in itertools.pairwise([*bounds, len(text)])]


def printed_day(tokenizer: Any, config: DataConfig) -> str | None:
    """Return the day that the chat template prints, or None if it prints none."""
    templates = [find(tokenizer, config.chat_template) for find in (chat_template, tool_template)]
    return (config.date or str(date.today())) if any(map(prints_date, templates)) else None


def end_texts(tokenizer: Any) -> list[str]:
    """Return the tokens that end generation: the tokenizer's, and those of generation_config.json."""
    file = _generation_config(str(tokenizer.name_or_path), getattr(tokenizer, REVISION, None))
    ids = [tokenizer.eos_token_id]
    try:
        named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file else None
        ids += named if isinstance(named, list) else [named]
    except (OSError, ValueError, AttributeError):
        pass  # transformers, too, does without it
    texts = [tokenizer.convert_ids_to_tokens(i) for i in ids if isinstance(i, int) and 0 <= i < len(tokenizer)]
    return list(dict.fromkeys(text for text in texts if text))


def _generation_config(model: str, revision: str | None) -> Path | None:
    """Return the file of a model folder or hub id, or None: a model may come without it."""
    if Path(model).is_dir() or not HUB_ID.fullmatch(model):
        return Path(model) / "generation_config.json"
    from transformers.utils import cached_file

    try:
        missing = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
        found = cached_file(model, "generation_config.json", revision=revision or "main", **missing)
    except (OSError, ValueError):
        return None
    return Path(found) if found else None


def _refuse_unread(template: str, variables: dict[str, Any]) -> None:
    """Raise InputError for a variable that has no effect."""
    for name, value in variables.items():
        closes = name == "enable_thinking" and value is False and "<think>" in template
        if name in RESERVED:
            raise InputError("data.template_kwargs", variables, f"{name!r} comes from the data; take it out")
        if not (closes or reads(template, [name])):
            raise InputError("data.template_kwargs", variables, f"the chat template does not read {name!r}; take it out")


def _prefix_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that the tokenizer puts before a text."""
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return next((whole[:k] for k in range(len(whole)) if whole[k : k + len(text)] == text), [])


def shared(answers: Sequence[TargetText]) -> list[TargetText]:
    """Return few texts with all the answers, each behind the context it has on its own."""
    left, found = list(answers), []
    while left:
        last = left.pop()
        inside, others = [], []
        for answer in left:
            fits = answer.end <= last.start and last.text.startswith(answer.text[: answer.end])
            (inside if fits else others).append(answer)
        spans = sorted(span for answer in (*inside, last) for span in answer.spans)
        if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
            inside, others, spans = [], left, list(last.spans)
        notes = dict.fromkeys(note for answer in (*inside, last) for note in answer.notes)
        found.append(TargetText(last.text, tuple(spans), tuple(notes)))
        left = others
    return found[::-1]
