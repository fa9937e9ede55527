"""Load the training and evaluation samples, tokenised once per data set and tokenizer.

Every trial on the machine memory-maps the same arrays. They hold samples at full length, so trials
of any max_seq_length share one cache. The content of a sample decides whether it is for evaluation:
samples with equal tokens fall on the same side, so none leaks from training into evaluation.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.trial import ON_TRAINING_SAMPLES, DataConfig
from engine.data.packing import Sample
from engine.data.readers import open_samples
from engine.data.templates import chat_template
from engine.data.tokens import VERSION, TokenSet, render_all, tokenise
from engine.errors import InputError
from engine.sources.builtin import resolve_data
from engine.system.shared_cache import build_once


class View:
    """Select samples of a TokenSet and cut them to a length.

    Samples that lose every target by the cut are left out; `num_dropped` counts them.
    """

    def __init__(self, tokens: TokenSet, chosen: np.ndarray, max_seq_length: int) -> None:
        self._given = chosen
        kept = chosen[tokens.first_target[chosen] < max_seq_length]
        self._tokens, self._chosen, self._max_seq_length = tokens, kept, max_seq_length
        self.num_dropped = len(chosen) - len(kept)
        self.lengths = np.minimum(tokens.offsets[kept + 1] - tokens.offsets[kept], max_seq_length)

    def __len__(self) -> int:
        return len(self._chosen)

    def digest(self) -> str:
        """Return 16 hex digits of the samples, at full length and in order.

        They are equal for the same tokens with the same first targets.
        """
        content = np.stack([self._tokens.hashes[self._given], self._tokens.first_target[self._given].astype(np.uint64)])
        return hashlib.sha256(content.tobytes()).hexdigest()[:16]

    def largest_id(self) -> int:
        """Return the largest token id in the arrays that these samples come from."""
        return int(np.max(self._tokens.input_ids)) if len(self._tokens.input_ids) else 0

    def __getitem__(self, i: int) -> Sample:
        start = self._tokens.offsets[self._chosen[i]]
        part = slice(start, start + self.lengths[i])
        return Sample(np.asarray(self._tokens.input_ids[part]), np.asarray(self._tokens.is_target[part]))


def load_data(config: DataConfig, tokenizer: Any) -> tuple[View, View]:
    """Return the (train, eval) views, tokenised on first use; InputError if either is empty."""
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
    """Return (train, eval) indices: the samples with the lowest content hashes are for evaluation.

    Samples with equal hashes stay together. InputError if no sample is left for training.
    """
    order = np.argsort(hashes, kind="stable")
    border = hashes[order[max(1, round(len(order) * eval_fraction)) - 1]]
    train, evaluation = order[hashes[order] > border], order[hashes[order] <= border]
    if len(train) == 0:
        raise InputError("data.train", f"{len(order)} samples", "needs at least 2 different samples, or data.eval")
    return np.sort(train), evaluation


def _by_content(tokens: TokenSet, index: np.ndarray) -> np.ndarray:
    """Return `index` in the order of content hashes.

    The first n samples are then the same ones for any order of the file.
    """
    return index[np.argsort(tokens.hashes[index], kind="stable")]


def _sources(config: DataConfig) -> tuple[str, str | None]:
    """Return the (train, eval) paths; None as the second if evaluation has no separate source.

    A builtin brings its own evaluation part, and `data.eval` alone may name one.
    """
    train = resolve_data(config.train)
    if config.eval == ON_TRAINING_SAMPLES:
        return (str(train[0]) if train else config.train), None
    evaluation = resolve_data(config.eval) if config.eval else train
    train_path = str(train[0]) if train else config.train
    return train_path, str(evaluation[1]) if evaluation else config.eval


def _refuse_empty(view: View, field: str, value: int) -> None:
    if len(view) == 0:
        raise InputError(field, value, f"raise it: none of the {view.num_dropped} samples keeps a target token at this length")


def _token_set(field: str, source: str, split: str, config: DataConfig, tokenizer: Any) -> TokenSet:
    template = chat_template(tokenizer, config.chat_template)
    if not tokenizer.is_fast:
        raise InputError("model.path", type(tokenizer).__name__, "must have a fast tokenizer (tokenizer.json), to locate targets")
    content, samples = open_samples(field, source, split)
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
        texts = list(render_all(field, samples, config.format, template, tokenizer))
        if not texts:
            raise InputError(field, source, "is empty; it must hold at least one sample")
        tokenise(texts, tokenizer, folder)

    return TokenSet.load(build_once(f"tokens-{key}", build))
