"""Load the training and evaluation samples, tokenised once per data set and tokenizer.

Every trial on the machine memory-maps the same arrays. They hold samples at full length, so trials
of any max_seq_length share one cache. The content of a row decides whether it is for evaluation:
all samples of a row, and rows with equal tokens, fall on the same side. So none leaks from training
into evaluation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from engine.command_answers import EVALUATION, TRAINING
from engine.config.data_section import ON_TRAINING_SAMPLES, DataConfig, as_list
from engine.config.data_sources import SourceConfig
from engine.config.preference_section import PREFERENCE
from engine.config.trial import TrainConfig
from engine.data.readers import read_rows
from engine.data.row_pipeline import RowCounts, RowPipeline, merged
from engine.data.source_files import NamedSource, find_source
from engine.data.tokens import VERSION, TokenSet, tokenise
from engine.data.view import AnyView, JoinedView, View
from engine.dialogue.encoding import Encoder
from engine.dialogue.templates import chat_template
from engine.errors import InputError, InputsChanged
from engine.sources.builtin import PREFIX, resolve_data
from engine.sources.identity import identify_model, identify_start, is_input_fault, refuse_changed, short_digest
from engine.system.shared_cache import build_once
from engine.units import counted

COUNTS = "counts.json"
HELD_OUT = "held out"
PartCounts = dict[tuple[str, str], RowCounts]
"""(training or evaluation, name of the source or set; empty if there is one) -> counts of its source."""


def load_data(config: DataConfig, tokenizer: Any) -> tuple[AnyView, AnyView]:
    """Return the (train, eval) views, tokenised on first use; InputError if either is empty."""
    train_view, eval_view, _ = load_counted_data(config, tokenizer)
    return train_view, eval_view


def load_counted_data(config: DataConfig, tokenizer: Any) -> tuple[AnyView, AnyView, PartCounts]:
    """Return what load_data returns, and the counts of each part's source.

    A mixture's training view has its sources as parts `0`, `1` and so on, at any weights. The view
    of several evaluation sets has these as parts, by name.
    """
    sources, evaluation = train_sources(config), evaluation_sources(config)
    loaded = {name: token_set(source, config, tokenizer) for name, source in sources.items()}
    train = _Training(config, {name: tokens for name, (tokens, _) in loaded.items()})
    _refuse_equal({f"data.train.{name}": tokens for name, tokens in train.tokens.items()}, config)
    hashes = train.hashes()
    train_rows, held_out = np.arange(len(hashes)), None
    if HELD_OUT in evaluation.values():
        train_rows, held_out = split_by_content(hashes, config.eval_fraction)
    train_view = train.view(train_rows)
    counts: PartCounts = {(TRAINING, name): found for name, (_, found) in loaded.items()}
    both = merged(found for _, found in loaded.values())
    views: dict[str, AnyView] = {}
    own: dict[str, TokenSet] = {}
    for name, source in evaluation.items():
        counts[EVALUATION, name] = both
        if isinstance(source, NamedSource):
            own[f"data.eval.{name}"], counts[EVALUATION, name] = token_set(source, config, tokenizer)
            views[name] = _eval_view(own[f"data.eval.{name}"], config)
        else:
            order = held_out if source == HELD_OUT else np.argsort(hashes, kind="stable")
            views[name] = train.evaluated(order[: config.eval_max_samples])
        _refuse_empty(views[name], "evaluation", "data.eval_max_seq_length", config)
    _refuse_equal(own, config)
    return train_view, JoinedView(views, config.set_weights) if config.eval_sets else views[""], counts


class _Training:
    """Hold the tokenised sources of the training samples, whose rows are numbered through."""

    def __init__(self, config: DataConfig, tokens: Mapping[str, TokenSet]) -> None:
        self._config, self.tokens = config, tokens
        self._starts = np.cumsum([0, *(one.num_rows for one in tokens.values())])

    def hashes(self) -> np.ndarray:
        """Return the content hashes of all rows."""
        return np.concatenate([np.asarray(one.row_hashes) for one in self.tokens.values()])

    def view(self, rows: np.ndarray) -> AnyView:
        """Return the training samples in these rows. Raises InputError if a source has none."""
        config, parts = self._config, {}
        for name, tokens, here in self._by_source(rows):
            if config.train_max_samples is not None:
                here = np.sort(_by_content(tokens, here)[: config.train_max_samples])
            parts[name] = View(tokens, here, config.max_seq_length, config.overlong, TRAINING, config.format == PREFERENCE)
            if config.mixture and not len(here):
                raise InputError(f"data.train.{name}", config.mixture[int(name)].path, "has no row left beside the held-out ones")
            _refuse_empty(parts[name], "training", "data.max_seq_length", config)
        weights = {str(i): source.weight for i, source in enumerate(config.mixture)}
        return JoinedView(parts, weights) if config.mixture else parts[""]

    def evaluated(self, rows: np.ndarray) -> AnyView:
        """Return the samples in these rows as evaluation samples, in the order of the rows within a source."""
        config = self._config
        views = {name: _evaluated(tokens, here, config) for name, tokens, here in self._by_source(rows) if len(here)}
        return JoinedView(views) if len(views) > 1 else next(iter(views.values()))

    def _by_source(self, rows: np.ndarray) -> Iterator[tuple[str, TokenSet, np.ndarray]]:
        for (name, tokens), start, end in zip(self.tokens.items(), self._starts, self._starts[1:], strict=False):
            yield name, tokens, rows[(rows >= start) & (rows < end)] - start


def _eval_view(tokens: TokenSet, config: DataConfig) -> View:
    chosen = _by_content(tokens, np.arange(tokens.num_rows))[: config.eval_max_samples]
    return _evaluated(tokens, chosen, config)


def _evaluated(tokens: TokenSet, rows: np.ndarray, config: DataConfig) -> View:
    return View(tokens, rows, config.eval_max_seq_length, config.overlong, EVALUATION, config.format == PREFERENCE)


def _refuse_equal(tokens: Mapping[str, TokenSet], config: DataConfig) -> None:
    """Raise InputError if two sources of a field have the same rows, whatever their names."""
    known: dict[bytes, str] = {}
    for field, one in tokens.items():
        digest = hashlib.sha256(np.asarray(one.row_hashes).tobytes()).digest()
        if digest in known:
            allowed = f"has the same samples as {known[digest]}; name each source once"
            raise InputError(field, config.sources().get(field), allowed)
        known[digest] = field


def load_recorded(config: TrainConfig, tokenizer: Any, recorded: Mapping[str, str] | None) -> tuple[AnyView, AnyView]:
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


def identify(config: TrainConfig, tokenizer: Any, views: tuple[AnyView, AnyView]) -> dict[str, str]:
    """Return the digests of all that the trials of a sweep share, by part (engine/sources/identity.py)."""
    return {
        **identify_model(config.model),
        **identify_start(config.lora),
        "template": short_digest(chat_template(tokenizer, config.data.chat_template) or ""),
        **identify_samples(views),
    }


def identify_samples(views: tuple[AnyView, AnyView]) -> dict[str, str]:
    """Return the digests of the training and the evaluation samples, and of each of their parts."""
    found: dict[str, str] = {}
    for part, view in zip((TRAINING, EVALUATION), views, strict=True):
        parts = view.parts if isinstance(view, JoinedView) else {}
        if part == TRAINING or (parts and view.weights):
            found |= {f"{part}/{name}": one.digest() for name, one in parts.items()}
        found[part] = view.digest()
    return found


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


def train_sources(config: DataConfig) -> dict[str, NamedSource]:
    """Return the training sources: those of a mixture by their places, or one without a name."""
    if not config.mixture:
        return {"": sources_of(config)[0]}
    found = {}
    for i, source in enumerate(config.mixture):
        field = f"data.train.{i}"
        parts = _builtin_parts(field, as_list(source.path))
        found[str(i)] = NamedSource(field, (str(parts[0]),)) if parts else _named(field, source)
    return found


def evaluation_sources(config: DataConfig) -> dict[str, NamedSource | str]:
    """Return the evaluation sources by name, HELD_OUT or ON_TRAINING_SAMPLES; one without a name if there is one."""
    if not config.eval_sets:
        if config.eval == ON_TRAINING_SAMPLES:
            return {"": ON_TRAINING_SAMPLES}
        own = None if config.mixture and config.eval is None else sources_of(config)[1]
        return {"": own or HELD_OUT}
    known = {(one.paths, one.split, one.name, one.revision, one.files): field for field, one in train_sources(config).items()}
    found: dict[str, NamedSource | str] = {}
    for name, source in config.eval_sets.items():
        field = f"data.eval.{name}"
        if source is None:
            brought = None if config.mixture else _builtin_parts("data.train", as_list(config.train))
            found[name] = NamedSource(field, (str(brought[1]),)) if brought else HELD_OUT
        elif source.path == ON_TRAINING_SAMPLES:
            found[name] = ON_TRAINING_SAMPLES
        else:
            parts = _builtin_parts(field, as_list(source.path))
            found[name] = one = NamedSource(field, (str(parts[1]),)) if parts else _named(field, source)
            if (one.paths, one.split, one.name, one.revision, one.files) in known:
                allowed = f"are training samples; another split is {{path: ..., split: ...}}, {field}=train means these"
                raise InputError(field, source.path, allowed)
    return found


def _named(field: str, source: SourceConfig) -> NamedSource:
    return NamedSource(field, as_list(source.path), source.split, source.name, source.revision, source.files)


def sources_of(config: DataConfig) -> tuple[NamedSource, NamedSource | None]:
    """Return the (train, eval) sources of one training source; None if evaluation has no separate source.

    A builtin brings its own evaluation part, and `data.eval` alone may name one.
    """
    other = as_list(config.eval)
    paths = () if config.mixture else as_list(config.train)
    train = None if config.mixture else _builtin_parts("data.train", paths)
    source = NamedSource(
        "data.train", (str(train[0]),) if train else paths, config.train_split, config.train_name, config.train_revision,
        config.train_files,
    )  # fmt: skip
    if config.eval == ON_TRAINING_SAMPLES or config.eval_sets:
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


def _refuse_empty(view: AnyView, part: str, field: str, config: DataConfig) -> None:
    if len(view) == 0:
        lost = f"none of the {counted(view.num_dropped, f'{part} sample')} keeps a target token at this length"
        others = ("cut",) * (config.overlong == "drop") + ("split",) * (config.format != PREFERENCE)
        way_out = f"raise it, or data.overlong={' or '.join(others)}" if others else "raise it"
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
