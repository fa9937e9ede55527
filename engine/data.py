"""Samples on disk -> tokens on disk, once per data set and tokenizer, memory-mapped by every trial of the machine.

Tokenised at full length, so trials of any max_seq_length share one cache. The evaluation set is chosen by content: samples
with equal tokens fall on the same side, so none leaks from training into evaluation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.bounded import Bounded, TooCostly
from engine.builtin import resolve_data
from engine.cache import build_once
from engine.config import HUB_ID, ON_TRAINING_SAMPLES, DataConfig
from engine.errors import InputError, first_line
from engine.packing import Sample
from engine.templates import Renderer, SampleError, TargetText, chat_template, detect_format

VERSION = 1  # of the token cache's content
CHUNK = 512  # texts per call of the tokenizer
SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class TokenSet:
    """All samples of one source: input_ids int32 and is_target bool, end to end; sample i is offsets[i]:offsets[i + 1].

    first_target[i]: position of its first target token; hashes[i]: 64 bits of its content."""

    input_ids: np.ndarray
    is_target: np.ndarray
    offsets: np.ndarray
    first_target: np.ndarray
    hashes: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> TokenSet:
        return cls(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls.__dataclass_fields__})

    def __len__(self) -> int:
        return len(self.offsets) - 1


class View:
    """Some samples of a TokenSet, cut to a length. Samples that lose every target by the cut are left out (num_dropped)."""

    def __init__(self, tokens: TokenSet, chosen: np.ndarray, max_seq_length: int) -> None:
        self._given = chosen
        kept = chosen[tokens.first_target[chosen] < max_seq_length]
        self._tokens, self._chosen, self._max_seq_length = tokens, kept, max_seq_length
        self.num_dropped = len(chosen) - len(kept)
        self.lengths = np.minimum(tokens.offsets[kept + 1] - tokens.offsets[kept], max_seq_length)

    def __len__(self) -> int:
        return len(self._chosen)

    def digest(self) -> str:
        """16 hex digits of the samples, at full length and in order: equal exactly for the same tokens and targets' starts."""
        content = np.stack([self._tokens.hashes[self._given], self._tokens.first_target[self._given].astype(np.uint64)])
        return hashlib.sha256(content.tobytes()).hexdigest()[:16]

    def __getitem__(self, i: int) -> Sample:
        start = self._tokens.offsets[self._chosen[i]]
        part = slice(start, start + self.lengths[i])
        return Sample(np.asarray(self._tokens.input_ids[part]), np.asarray(self._tokens.is_target[part]))


def load_data(config: DataConfig, tokenizer: Any) -> tuple[View, View]:
    """(train, eval) views, tokenised on first use. Either one empty is an InputError."""
    train_source, eval_source = _sources(config)
    train = _token_set("data.train", train_source, config.train_split, config, tokenizer)
    if config.eval == ON_TRAINING_SAMPLES:
        evaluation, train_index = train, np.arange(len(train))
        eval_index = _by_content(train, train_index)
    elif eval_source is None:
        train_index, eval_index = split_by_content(train.hashes, config.eval_fraction)
        evaluation = train
    else:
        evaluation = _token_set("data.eval", eval_source, config.eval_split, config, tokenizer)
        train_index, eval_index = np.arange(len(train)), _by_content(evaluation, np.arange(len(evaluation)))
    if config.train_max_samples is not None:
        train_index = np.sort(_by_content(train, train_index)[: config.train_max_samples])
    train_view = View(train, train_index, config.max_seq_length)
    eval_view = View(evaluation, eval_index[: config.eval_max_samples], config.eval_max_seq_length)
    _refuse_empty(train_view, "data.max_seq_length", config.max_seq_length)
    _refuse_empty(eval_view, "data.eval_max_seq_length", config.eval_max_seq_length)
    return train_view, eval_view


def split_by_content(hashes: np.ndarray, eval_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(train, eval) indices: the share of samples with the lowest content hashes is evaluation, equal ones together."""
    order = np.argsort(hashes, kind="stable")
    border = hashes[order[max(1, round(len(order) * eval_fraction)) - 1]]
    train, evaluation = order[hashes[order] > border], order[hashes[order] <= border]
    if len(train) == 0:
        raise InputError("data.train", f"{len(order)} samples", "needs at least 2 different samples, or data.eval")
    return np.sort(train), evaluation


def _by_content(tokens: TokenSet, index: np.ndarray) -> np.ndarray:
    """In an order that the samples alone decide, so that so many of them are the same ones wherever they stand in the file."""
    return index[np.argsort(tokens.hashes[index], kind="stable")]


def _sources(config: DataConfig) -> tuple[str, str | None]:
    """(train, eval) paths; a builtin brings its own evaluation part, and can also be named as `data.eval` alone."""
    train = resolve_data(config.train)
    if config.eval == ON_TRAINING_SAMPLES:
        return (str(train[0]) if train else config.train), None
    evaluation = resolve_data(config.eval) if config.eval else train
    train_path = str(train[0]) if train else config.train
    return train_path, str(evaluation[1]) if evaluation else config.eval


def _refuse_empty(view: View, field: str, value: int) -> None:
    if len(view) == 0:
        raise InputError(field, value, f"no sample keeps a target token at this length ({view.num_dropped} lost theirs)")


def _token_set(field: str, source: str, split: str, config: DataConfig, tokenizer: Any) -> TokenSet:
    template = chat_template(tokenizer, config.chat_template)
    if not tokenizer.is_fast:
        raise InputError("model.path", type(tokenizer).__name__, "needs a fast tokenizer (tokenizer.json), to place targets")
    content, samples = _open(field, source, split)
    identity = [
        VERSION,
        content,
        config.format,
        template,
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.bos_token,
        tokenizer.eos_token,
    ]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]

    def build(folder: Path) -> None:
        texts = list(_render_all(field, samples, config.format, template, tokenizer))
        if not texts:
            raise InputError(field, source, "is empty; it must hold at least one sample")
        _tokenise(texts, tokenizer, folder)

    return TokenSet.load(build_once(f"tokens-{key}", build))


def _open(field: str, source: str, split: str) -> tuple[str, Iterator[tuple[str, Mapping[str, Any]]]]:
    """(identity of the content, samples with a name for messages). Reading starts only when the iterator is used."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise InputError(field, source, f"allowed file types: {', '.join(SUFFIXES)}")
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        return digest, _read_file(field, path)
    if path.suffix in SUFFIXES or path.is_dir() or not HUB_ID.fullmatch(source) or ".." in source:
        raise InputError(field, source, "no such file; allowed: a .jsonl, .json or .parquet file, a hub id, builtin:<name>")
    return _open_hub(field, source, split)


def _read_file(field: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        yield from _read_parquet(field, path) if path.suffix == ".parquet" else _read_json(field, path)
    except UnicodeDecodeError as error:
        raise InputError(field, str(path), f"must be UTF-8 text ({error})") from None


def _read_parquet(field: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        rows = (row for batch in parquet.ParquetFile(path).iter_batches() for row in batch.to_pylist())
        yield from ((f"{field} row {i}", row) for i, row in enumerate(rows, 1))
    except (OSError, pa.ArrowException) as error:
        raise InputError(field, str(path), f"must be a whole Parquet file ({first_line(error)})") from None


def _read_json(field: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8") as handle:
        if path.suffix == ".json":
            rows = _parse(field, handle.read())
            if not isinstance(rows, list):
                raise InputError(field, str(path), f"must hold a list of samples, not a {type(rows).__name__}")
            yield from ((f"{field} item {i}", row) for i, row in enumerate(rows, 1))
            return
        for i, line in enumerate(handle, 1):
            if line.strip():
                yield f"{field} line {i}", _parse(f"{field} line {i}", line)


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(where, text.strip()[:60], f"must be JSON ({error})") from None
    except RecursionError:
        raise InputError(where, text.strip()[:60], "must be JSON, nested less deeply") from None


def _open_hub(field: str, source: str, split: str) -> tuple[str, Iterator[tuple[str, Mapping[str, Any]]]]:
    from datasets import load_dataset

    try:
        data = load_dataset(source, split=split)
    except Exception as error:  # the hub client raises a dozen kinds, offline, missing, gated, no such split
        allowed = f"no such file, and not to be had from the hub (split {split!r}): {first_line(error)}"
        raise InputError(field, source, allowed) from error
    return f"{source}@{data._fingerprint}", ((f"{field} row {i}", row) for i, row in enumerate(data, 1))


def _tokenise(texts: list[tuple[str, TargetText]], tokenizer: Any, folder: Path) -> None:
    """Write the arrays of a TokenSet. texts: (name of the sample for messages, its text)."""
    ids, targets, lengths, first, hashes = [], [], [], [], []
    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        encoded = tokenizer([t.text for _, t in chunk], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for (name, text), id_list, offsets in zip(chunk, encoded["input_ids"], encoded["offset_mapping"]):
            sample_ids = np.asarray(id_list, dtype=np.int32)
            is_target = _targets(np.asarray(offsets, dtype=np.int64).reshape(-1, 2), text.spans)
            where = np.flatnonzero(is_target[1:])  # the first token of a sample is never predicted
            if len(where) == 0:
                raise InputError(name, text.text, "has no target token, so nothing to learn from")
            ids.append(sample_ids)
            targets.append(is_target)
            lengths.append(len(sample_ids))
            first.append(int(where[0]) + 1)
            hashes.append(int.from_bytes(hashlib.sha256(sample_ids.tobytes()).digest()[:8], "little"))
    np.save(folder / "input_ids.npy", np.concatenate(ids))
    np.save(folder / "is_target.npy", np.concatenate(targets))
    np.save(folder / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    np.save(folder / "first_target.npy", np.asarray(first, dtype=np.int64))
    np.save(folder / "hashes.npy", np.asarray(hashes, dtype=np.uint64))


def _render_all(
    field: str, samples: Any, format_name: str, template: str | None, tokenizer: Any
) -> Iterator[tuple[str, TargetText]]:
    render = None
    with ExitStack() as child:
        for name, sample in samples:
            if not isinstance(sample, Mapping):
                raise InputError(name, sample, "must be an object with named columns")
            if render is None:
                render = Renderer(tokenizer, detect_format(sample, format_name, name), template).render
                if template is not None:
                    render = child.enter_context(Bounded(render))
            try:
                yield from ((name, text) for text in render(sample))
            except TooCostly as error:
                raise InputError("data.chat_template", template, f"{error} for {name}") from None
            except SampleError as error:
                raise InputError(name, dict(sample), str(error)) from error
            except KeyError as error:
                raise InputError(name, sorted(sample), f"column {error} is missing; the first sample had it") from None


def _targets(offsets_L2: np.ndarray, spans: tuple[tuple[int, int], ...]) -> np.ndarray:
    start, end = offsets_L2[:, 0], offsets_L2[:, 1]
    hit = np.zeros(len(offsets_L2), dtype=bool)
    for low, high in spans:
        hit |= (end > low) & (start < high) & (end > start)
    return hit
