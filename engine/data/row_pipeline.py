"""Take rows from their file to token ids in batches, and count what was read and left out.

One batch is in memory at a time, whatever the size of the source. A template runs in a child
process with limits (engine/system/limited_child.py), which renders a whole batch in one call.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import Any

from engine.config.data_section import DataConfig
from engine.config.preference_section import IN_A_PAIR
from engine.data.formats import RowFormat
from engine.data.readers import SourceRow
from engine.dialogue.conversation import AnswerPair, Conversation, Document, Encoded, SampleError
from engine.dialogue.encoding import Encoder
from engine.errors import InputError
from engine.system.command_line import tell
from engine.system.limited_child import Bounded, TooCostly

BATCH_ROWS, BATCH_CHARACTERS = 256, 400_000
RENDERED_CHARACTERS = 2 * BATCH_CHARACTERS  # that are tokenised at once
FIRST_ROWS = 100  # those that settle the format
MAX_REASONS = 3  # lines about bad rows that are kept


@dataclass
class RowCounts:
    """Count the rows of a source: read, and bad, with the lines about the first bad ones.

    num_bos and num_eos: documents to which BOS or EOS was added. notes: what the author of the data
    may not expect, with the number of rows.
    """

    num_read: int = 0
    num_bad: int = 0
    num_bos: int = 0
    num_eos: int = 0
    reasons: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)


def merged(counts: Iterable[RowCounts]) -> RowCounts:
    """Return the counts of several sources together."""
    total = RowCounts()
    for one in counts:
        total.num_read, total.num_bad = total.num_read + one.num_read, total.num_bad + one.num_bad
        total.num_bos, total.num_eos = total.num_bos + one.num_bos, total.num_eos + one.num_eos
        total.reasons += one.reasons
        total.notes = {note: total.notes.get(note, 0) + one.notes.get(note, 0) for note in {**total.notes, **one.notes}}
    return total


@dataclass(frozen=True)
class _Sample:
    """One readable row: its name, and what will be encoded."""

    name: str
    content: Conversation | Document | AnswerPair

    def fault(self, error: SampleError) -> InputError:
        return InputError(self.name, _shown(self.content), str(error))

    @property
    def is_masked(self) -> bool:
        """Return True if the data leave an answer of this dialogue without loss."""
        content = self.content
        if not isinstance(content, Conversation):
            return False
        return any(m["role"] == "assistant" and not learned for m, learned in zip(content.messages, content.learned))

    def digest(self) -> bytes:
        """Return a digest of the row's content, which is the same for all variables of a template."""
        sides = (self.content.chosen, self.content.rejected) if isinstance(self.content, AnswerPair) else (self.content,)
        content = [{name: value for name, value in asdict(side).items() if name != "notes"} for side in sides]
        content = content if len(content) > 1 else content[0]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()


class RowPipeline:
    """Encode the rows of one source; `counts` is complete once all have been taken."""

    def __init__(self, config: DataConfig, encoder: Encoder, tokenizer: Any) -> None:
        self._skips, self._encoder, self._tokenizer = config.bad_rows == "skip", encoder, tokenizer
        self._format = RowFormat(config.format, config.columns, encoder.has_template)
        self._template, self._has_variables = config.chat_template, config.template_kwargs is not None
        self._first: InputError | None = None
        self.counts = RowCounts()

    def encoded(self, rows: Iterable[SourceRow]) -> Iterator[tuple[list[Encoded], bool, bytes | None]]:
        """Yield the samples of each good row, and whether the data mask some of its answers.

        With data.template_kwargs a row is known by its content: a space may vary them, and all
        trials must hold out the same rows. So it yields a digest of the content then.
        InputError at the first bad row, unless data.bad_rows=skip; then only if all are bad.
        """
        with ExitStack() as stack:
            call = self._render
            if self._encoder.has_template:
                call = stack.enter_context(Bounded(self._render))
            pool = stack.enter_context(ThreadPoolExecutor(1))
            for samples, rendered in _ahead(self._batches(rows), lambda batch: self._render_batch(call, batch), pool):
                yield from self._encode(samples, rendered)
        if self._first is not None and self.counts.num_bad == self.counts.num_read:
            raise self._first

    def _batches(self, rows: Iterable[SourceRow]) -> Iterator[list[_Sample]]:
        batch: list[_Sample] = []
        size, rows = 0, iter(rows)
        first = list(islice(rows, FIRST_ROWS))
        self._format.decide((row.name, row.columns) for row in first if row.fault is None)
        for row in chain(first, rows):
            self.counts.num_read += 1
            try:
                if row.fault is not None:
                    raise row.fault
                batch.append(_Sample(row.name, self._format.read(row.name, row.columns)))
            except InputError as error:
                self._bad(error)
                continue
            size += _size(batch[-1].content)
            if len(batch) == BATCH_ROWS or size > BATCH_CHARACTERS:
                tell("tokenising rows", self.counts.num_read)
                yield batch
                batch, size = [], 0
        if batch:
            yield batch
        if self.counts.num_read > self.counts.num_bad:
            self._format.refuse_unseen()

    def _render_batch(self, call: Callable[[list[Any]], list[Any]], batch: list[_Sample]) -> list[Any]:
        """Return what was rendered of each sample, or its SampleError."""
        try:
            return call([sample.content for sample in batch])
        except TooCostly:
            return [self._render_alone(call, sample) for sample in batch]

    def _render_alone(self, call: Callable[[list[Any]], list[Any]], sample: _Sample) -> Any:
        try:
            return call([sample.content])[0]
        except TooCostly as error:
            raise InputError("data.chat_template", self._template, f"{error} for {sample.name}") from None

    def _render(self, contents: list[Conversation | Document | AnswerPair]) -> list[Any]:
        found: list[Any] = []
        for content in contents:
            try:
                found.append(self._encoder.render(content))
            except SampleError as error:
                found.append(error)
        return found

    def _encode(self, samples: list[_Sample], rendered: list[Any]) -> Iterator[tuple[list[Encoded], bool, bytes | None]]:
        for group in _groups(zip(samples, rendered, strict=True)):
            yield from self._encode_group(group)

    def _encode_group(self, group: list[tuple[_Sample, Any]]) -> Iterator[tuple[list[Encoded], bool, bytes | None]]:
        good = iter(self._encoder.encode([one for _, one in group if not isinstance(one, SampleError)]))
        for sample, one in group:
            encoded = one if isinstance(one, SampleError) else next(good)
            if not isinstance(encoded, SampleError) and not (encoded and all(any(e.is_target[1:]) for e in encoded)):
                encoded = SampleError("has no target token, so there is nothing to learn")
            if isinstance(sample.content, AnswerPair) and not isinstance(encoded, SampleError) and len(encoded) != IN_A_PAIR:
                encoded = SampleError("an answer of several turns is tokenised otherwise as context, so it is no pair")
            if isinstance(encoded, SampleError):
                self._bad(sample.fault(encoded))
                continue
            self._count_ends(sample.content, encoded)
            for note in {note for one in encoded for note in one.notes}:
                self.counts.notes[note] = self.counts.notes.get(note, 0) + 1
            yield encoded, sample.is_masked, sample.digest() if self._has_variables else None

    def _count_ends(self, content: Conversation | Document | AnswerPair, encoded: list[Encoded]) -> None:
        """Count BOS and EOS around a document, or the chosen one of a pair, that its text does not hold itself."""
        content = content.chosen if isinstance(content, AnswerPair) else content
        if isinstance(content, Document):
            bos, eos = self._tokenizer.bos_token, self._tokenizer.eos_token
            ids, text = encoded[0].input_ids, content.prompt + content.completion
            self.counts.num_bos += bool(bos) and ids[0] == self._tokenizer.bos_token_id and not text.startswith(bos)
            self.counts.num_eos += bool(eos) and ids[-1] == self._tokenizer.eos_token_id and not text.endswith(eos)

    def _bad(self, error: InputError) -> None:
        if not self._skips:
            raise error
        self._first = self._first or error
        self.counts.num_bad += 1
        if len(self.counts.reasons) < MAX_REASONS:
            self.counts.reasons.append(str(error))


def _groups(pairs: Iterable[tuple[_Sample, Any]]) -> Iterator[list[tuple[_Sample, Any]]]:
    """Yield the pairs in groups of few characters.

    A template that writes earlier turns differently makes many times the text of a long dialogue.
    """
    group: list[tuple[_Sample, Any]] = []
    size = 0
    for pair in pairs:
        group.append(pair)
        size += 0 if isinstance(pair[1], SampleError) else sum(len(text.text) for text in pair[1])
        if size > RENDERED_CHARACTERS:
            yield group
            group, size = [], 0
    yield group


def _ahead(batches: Iterator[Any], work: Callable[[Any], Any], pool: ThreadPoolExecutor) -> Iterator[tuple[Any, Any]]:
    """Yield (batch, work(batch)), and work on the next batch meanwhile in the pool's one thread.

    The caller itself does the first one: it forks the child while no other thread runs.
    """
    waiting: tuple[Any, Future[Any]] | None = None
    for i, batch in enumerate(batches):
        if i == 0:
            yield batch, work(batch)
            continue
        following = (batch, pool.submit(work, batch))
        if waiting:
            yield waiting[0], waiting[1].result()
        waiting = following
    if waiting:
        yield waiting[0], waiting[1].result()


def _shown(content: Conversation | Document | AnswerPair) -> Any:
    """Return the content for a message."""
    if isinstance(content, AnswerPair):
        return [_shown(content.chosen), _shown(content.rejected)]
    return list(content.messages) if isinstance(content, Conversation) else content.prompt + content.completion


def _size(content: Conversation | Document | AnswerPair) -> int:
    if isinstance(content, AnswerPair):
        return _size(content.chosen) + _size(content.rejected)
    if isinstance(content, Document):
        return len(content.prompt) + len(content.completion)
    texts = sum(len(value) for message in content.messages for value in message.values() if isinstance(value, str))
    calls = [message["tool_calls"] for message in content.messages if "tool_calls" in message]
    return texts + len(str(calls)) * bool(calls) + len(str(content.tools)) * bool(content.tools)
