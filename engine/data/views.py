"""Load the training and evaluation samples, tokenised once per data set and tokenizer.

Every trial on the machine memory-maps the same arrays. They hold samples at full length, so trials
of any max_seq_length share one cache. The content of a row decides whether it is for evaluation:
all samples of a row, and rows with equal tokens, fall on the same side. So none leaks from training
into evaluation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.data_section import ON_TRAINING_SAMPLES, DataConfig, as_list
from engine.config.trial import TrainConfig
from engine.data.packing import Sample
from engine.data.readers import read_rows
from engine.data.row_pipeline import RowCounts, RowPipeline
from engine.data.source_files import NamedSource, find_source
from engine.data.tokens import VERSION, TokenSet, tokenise
from engine.dialogue.encoding import Encoder
from engine.dialogue.templates import chat_template
from engine.errors import InputError, InputsChanged
from engine.sources.builtin import PREFIX, resolve_data
from engine.sources.identity import identify_model, is_input_fault, refuse_changed, short_digest
from engine.system.shared_cache import build_once
from engine.units import counted

COUNTS = "counts.json"


class View:
    """Select rows of a TokenSet and fit their samples into a length.

    overlong: what happens to longer samples: `cut`, `drop`, `split` into pieces, or `error`. Samples
    without a target within the length are left out; `num_dropped` counts them. Pieces overlap by
    one token, which the second does not predict, so that each target is learnt once. part: training
    or evaluation, for messages.
    """

    def __init__(
        self, tokens: TokenSet, rows: np.ndarray, max_seq_length: int, overlong: str = "cut", part: str = "training"
    ) -> None:
        self._tokens, self.rows, self.max_seq_length = tokens, rows, max_seq_length
        self._given = tokens.samples_of(rows)
        full = tokens.offsets[self._given + 1] - tokens.offsets[self._given]
        self.num_given_tokens = int(full.sum())
        if overlong == "error" and (full > max_seq_length).any():
            count = int((full > max_seq_length).sum())
            longer = f"{count:,} of {counted(len(full), f'{part} sample')} {'is' if count == 1 else 'are'} longer"
            longer += f" than {counted(max_seq_length, 'token')}"
            raise InputError("data.overlong", overlong, f"{longer}, the longest has {full.max():,}; or cut, drop, split")
        if overlong == "drop":
            kept = full <= max_seq_length
        else:
            kept = tokens.first_target[self._given] < max_seq_length
        if overlong == "split":
            self._chosen, self._starts, self.lengths = _pieces(tokens, self._given, full, max_seq_length)
        else:
            self._chosen = self._given[kept]
            self._starts, self.lengths = tokens.offsets[self._chosen], np.minimum(full[kept], max_seq_length)
        self.num_dropped = len(full) - len(np.unique(self._chosen))
        self.num_cut = int((tokens.offsets[self._chosen + 1] - self._starts > self.lengths).sum()) if overlong == "cut" else 0

    def __len__(self) -> int:
        return len(self._chosen)

    @property
    def row_hashes(self) -> np.ndarray:
        """Return the content hash of each row that was selected."""
        return self._tokens.row_hashes[self.rows]

    @property
    def num_equal_rows(self) -> int:
        """Return the number of rows that repeat an earlier one."""
        return len(self.rows) - len(np.unique(self.row_hashes))

    @property
    def num_rows(self) -> int:
        """Return the number of rows with at least one sample that is used."""
        return len(np.unique(np.searchsorted(self._tokens.row_offsets, self._chosen, side="right")))

    @property
    def num_used_tokens(self) -> int:
        """Return the tokens of the data that are read at least once in a pass."""
        repeated = len(self._chosen) - len(np.unique(self._chosen))
        return int(self.lengths.sum()) - repeated

    def num_targets(self) -> int:
        """Return the number of tokens that carry loss in one pass."""
        return int(self.targets_of(np.arange(len(self))).sum())

    def targets_of(self, samples: np.ndarray) -> np.ndarray:
        """Return the number of tokens that carry loss in each of these samples."""
        starts = self._starts[samples]
        return self._tokens.count_targets(starts + 1, starts + self.lengths[samples])

    def digest(self) -> str:
        """Return 16 hex digits of the samples, at full length and in order.

        They are equal for the same tokens with the same first targets. The data's own loss masks
        count where there are any.
        """
        parts = [self._tokens.hashes[self._given], self._tokens.first_target[self._given].astype(np.uint64)]
        masks = self._tokens.masks[self._given]
        content = np.stack([*parts, masks] if masks.any() else parts)
        return hashlib.sha256(content.tobytes()).hexdigest()[:16]

    def targets_digest(self) -> str:
        """Return a digest of the tokens that carry loss within the length, in order."""
        found = hashlib.sha256()
        for i in range(len(self)):
            sample = self[i]
            found.update(sample.input_ids[1:][sample.is_target[1:]].tobytes())
        return found.hexdigest()[:16]

    def largest_id(self) -> int:
        """Return the largest token id in the arrays that these samples come from."""
        return int(np.max(self._tokens.input_ids)) if len(self._tokens.input_ids) else 0

    def row_of(self, i: int) -> int:
        """Return the place of the sample's row among the rows of its source that could be read, from 0."""
        return int(np.searchsorted(self._tokens.row_offsets, self._chosen[i], side="right")) - 1

    def is_whole(self, i: int) -> bool:
        """Return True if nothing of the sample lies beyond the length."""
        offsets, sample = self._tokens.offsets, self._chosen[i]
        return bool(self._starts[i] == offsets[sample] and self.lengths[i] == offsets[sample + 1] - offsets[sample])

    def __getitem__(self, i: int) -> Sample:
        part = slice(self._starts[i], self._starts[i] + self.lengths[i])
        return Sample(np.asarray(self._tokens.input_ids[part]), np.asarray(self._tokens.is_target[part]))


def _pieces(tokens: TokenSet, given: np.ndarray, full: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (sample, start, length) of the pieces that have a target."""
    counts = np.maximum(1, -(-(full - 1) // (length - 1)))
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    samples, before = np.repeat(given, counts), number * (length - 1)
    starts, lengths = tokens.offsets[samples] + before, np.minimum(length, np.repeat(full, counts) - before)
    kept = tokens.count_targets(starts + 1, starts + lengths) > 0
    return samples[kept], starts[kept], lengths[kept]


def load_data(config: DataConfig, tokenizer: Any) -> tuple[View, View]:
    """Return the (train, eval) views, tokenised on first use; InputError if either is empty."""
    train_view, eval_view, _ = load_counted_data(config, tokenizer)
    return train_view, eval_view


def load_counted_data(config: DataConfig, tokenizer: Any) -> tuple[View, View, tuple[RowCounts, RowCounts]]:
    """Return what load_data returns, and the counts of both sources."""
    train_source, eval_source = sources_of(config)
    train, train_counts = token_set(train_source, config, tokenizer)
    evaluation, eval_counts, all_rows = train, train_counts, np.arange(train.num_rows)
    if config.eval == ON_TRAINING_SAMPLES:
        train_rows, eval_rows = all_rows, _by_content(train, all_rows)
    elif eval_source is None:
        train_rows, eval_rows = split_by_content(train.row_hashes, config.eval_fraction)
    else:
        evaluation, eval_counts = token_set(eval_source, config, tokenizer)
        train_rows, eval_rows = all_rows, _by_content(evaluation, np.arange(evaluation.num_rows))
    if config.train_max_samples is not None:
        train_rows = np.sort(_by_content(train, train_rows)[: config.train_max_samples])
    train_view = View(train, train_rows, config.max_seq_length, config.overlong)
    chosen = eval_rows[: config.eval_max_samples]
    eval_view = View(evaluation, chosen, config.eval_max_seq_length, config.overlong, "evaluation")
    _refuse_empty(train_view, "training", "data.max_seq_length", config)
    _refuse_empty(eval_view, "evaluation", "data.eval_max_seq_length", config)
    return train_view, eval_view, (train_counts, eval_counts)


def load_recorded(config: TrainConfig, tokenizer: Any, recorded: Mapping[str, str] | None) -> tuple[View, View]:
    """Return the views of `load_data`; InputsChanged if they or the base model are not those recorded.

    recorded: what `identify` found when the sweep began; None outside a sweep.
    """
    if not recorded:
        return load_data(config.data, tokenizer)
    try:
        views = load_data(config.data, tokenizer)
        found = identify(config, tokenizer, views)
    except InputError as error:  # a file that is gone or half written has changed too
        if is_input_fault(error, recorded):
            raise InputsChanged(f"{error} (it was valid when the sweep began)") from error
        raise
    refuse_changed(config, recorded, found)
    return views


def identify(config: TrainConfig, tokenizer: Any, views: tuple[View, View]) -> dict[str, str]:
    """Return the digests of all that the trials of a sweep share, by part (engine/sources/identity.py)."""
    return {
        **identify_model(config.model),
        "template": short_digest(chat_template(tokenizer, config.data.chat_template) or ""),
        **identify_samples(views),
    }


def identify_samples(views: tuple[View, View]) -> dict[str, str]:
    """Return the digests of the training and the evaluation samples."""
    return {"training": views[0].digest(), "evaluation": views[1].digest()}


def split_by_content(hashes: np.ndarray, eval_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (train, eval) indices: the rows with the lowest content hashes are for evaluation.

    Rows with equal hashes stay together. InputError if no row is left for training.
    """
    order = np.argsort(hashes, kind="stable")
    border = hashes[order[max(1, round(len(order) * eval_fraction)) - 1]]
    train, evaluation = order[hashes[order] > border], order[hashes[order] <= border]
    if len(train) == 0:
        raise InputError("data.train", counted(len(order), "sample"), "needs at least 2 different samples, or data.eval")
    return np.sort(train), evaluation


def _by_content(tokens: TokenSet, rows: np.ndarray) -> np.ndarray:
    """Return `rows` in the order of content hashes.

    The first n are then the same ones for any order of the file.
    """
    return rows[np.argsort(tokens.row_hashes[rows], kind="stable")]


def sources_of(config: DataConfig) -> tuple[NamedSource, NamedSource | None]:
    """Return the (train, eval) sources; None as the second if evaluation has no separate source.

    A builtin brings its own evaluation part, and `data.eval` alone may name one.
    """
    paths, other = as_list(config.train), as_list(config.eval)
    train = _builtin_parts("data.train", paths)
    source = NamedSource(
        "data.train", (str(train[0]),) if train else paths, config.train_split, config.train_name, config.train_revision,
        config.train_files,
    )  # fmt: skip
    if config.eval == ON_TRAINING_SAMPLES:
        return source, None
    evaluation = _builtin_parts("data.eval", other) if config.eval else train
    if evaluation:
        return source, NamedSource("data.eval", (str(evaluation[1]),), config.eval_split)
    if not config.eval:
        return source, None
    name, revision, files = config.eval_name, config.eval_revision, config.eval_files
    if other == paths:
        name, revision = name or config.train_name, revision or config.train_revision
        same = (config.train_split, config.train_name, config.train_revision, config.train_files)
        if (config.eval_split, name, revision, files) == same:
            way_out = "are the training samples; data.eval_split names others, data.eval=train means these"
            raise InputError("data.eval", config.eval, way_out)
    return source, NamedSource("data.eval", other, config.eval_split, name, revision, files)


def _builtin_parts(field: str, paths: tuple[str, ...]) -> tuple[Path, Path] | None:
    if len(paths) > 1 and any(path.startswith(PREFIX) for path in paths):
        raise InputError(field, paths, "a builtin stands alone, not in a list")
    return resolve_data(paths[0], field)


def _refuse_empty(view: View, part: str, field: str, config: DataConfig) -> None:
    if len(view) == 0:
        lost = f"none of the {counted(view.num_dropped, f'{part} sample')} keeps a target token at this length"
        way_out = "raise it, or data.overlong=cut or split" if config.overlong == "drop" else "raise it, or data.overlong=split"
        raise InputError(field, view.max_seq_length, lost if config.overlong == "split" else f"{way_out}: {lost}")


def token_set(source: NamedSource, config: DataConfig, tokenizer: Any) -> tuple[TokenSet, RowCounts]:
    """Return the source tokenised, from the cache if it is there, and the counts of its rows."""
    encoder, found = Encoder(tokenizer, config), find_source(source)
    identity = [VERSION, found.identity, config.format, config.columns, config.bad_rows, encoder.identity]
    if config.template_kwargs is not None:  # rows are known by their content then
        identity.append("content")
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]

    def build(folder: Path) -> None:
        pipeline = RowPipeline(config, encoder, tokenizer)
        tokenise(pipeline.encoded(read_rows(source, found)), folder)
        if not pipeline.counts.num_read:
            raise InputError(source.field, str(source), "is empty; it must hold at least one sample")
        (folder / COUNTS).write_text(json.dumps(asdict(pipeline.counts)))

    folder = build_once(f"tokens-{key}", build)
    return TokenSet.load(folder), RowCounts(**json.loads((folder / COUNTS).read_text()))
