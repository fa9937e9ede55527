"""Take from evaluation samples what a metric needs: prompt, reference answer and the row itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from engine.config.data_section import DataConfig
from engine.config.metrics_section import CHOICE, MetricsConfig
from engine.config.preference_section import IN_A_PAIR
from engine.config.trial import TrainConfig
from engine.data.packing import Sample
from engine.data.readers import read_rows
from engine.data.source_files import find_source
from engine.data.view import AnyView, JoinedView, View
from engine.data.views import evaluation_sources, token_set, train_sources
from engine.errors import InputError
from engine.scoring.scorer import COMPARED, MISSING, as_text, field_value, references, unusable


@dataclass(frozen=True)
class TaskSample:
    """Hold one evaluation sample as a task.

    prompt: token ids [P] up to the last answer. answer: token ids of that answer in the data. text,
    reference: both as text. row: the columns of its row; empty if no metric reads them.
    """

    prompt: np.ndarray
    answer: np.ndarray
    text: str
    reference: str
    row: Mapping[str, Any]


def task_samples(config: TrainConfig, view: AnyView, tokenizer: Any) -> list[TaskSample]:
    """Return the first `metrics.max_samples` whole samples with a prompt, each with its last answer.

    Raises InputError if there are none, or if one lacks a field that a metric reads.
    """
    if config.data.overlong == "split":
        raise InputError("data.overlong", "split", "must be cut, drop or error with metrics, which answer whole samples")
    sets = view.parts if isinstance(view, JoinedView) and view.weights else {"": view}
    name = config.metrics.eval_set or next(iter(sets))
    view = sets[name]
    chosen: list[tuple[int, np.ndarray, np.ndarray]] = []
    for i in range(0, len(view), IN_A_PAIR if config.learns_pairs else 1):  # of a pair, the chosen answer
        parts = _parts(view[i]) if view.is_whole(i) else None
        if parts is not None:
            chosen.append((i, *parts))
            if len(chosen) == config.metrics.max_samples:
                break
    if not chosen:
        allowed = "need a whole evaluation sample with a prompt within data.eval_max_seq_length; plain text has no prompt"
        raise InputError("metrics", list(config.metrics.names), allowed)
    row_of: Callable[[int], int] = view.row_of if isinstance(view, View) else lambda i: 0
    rows: Mapping[int, Mapping[str, Any]] = {}
    if config.metrics.needs_rows:
        rows = evaluation_rows(config.data, tokenizer, {row_of(i) for i, _, _ in chosen}, name)

    def text(ids: np.ndarray) -> str:
        return tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    found = [TaskSample(p, a, text(p), text(a), rows.get(row_of(i), {})) for i, p, a in chosen]
    for number, sample in enumerate(found, 1):
        _check_fields(config.metrics, sample, f"evaluation sample {number}")
    _check_references(config.metrics, found)
    return found


def choices_of(metrics: MetricsConfig, sample: TaskSample, where: str) -> tuple[list[str], int]:
    """Return the choices as text, and the place of the right one. Raises InputError, naming the sample as `where`."""
    given = field_value(sample.row, metrics.choices) if isinstance(metrics.choices, str) else list(metrics.choices)
    if not isinstance(given, list) or len(given) < 2:
        allowed = f"must be a field with a list of at least two texts; {where} has {given!s:.80}"
        raise InputError("metrics.choices", metrics.choices, allowed)
    texts, wanted = [as_text(one).strip() for one in given], metrics.field_of(CHOICE)
    right = sample.reference if wanted is None else field_value(sample.row, wanted)
    if as_text(right).strip() in texts:
        return texts, texts.index(as_text(right).strip())
    if isinstance(right, int) and not isinstance(right, bool) and 0 <= right < len(texts):
        return texts, right
    allowed = f"the right answer must be one of the choices, or its place from 0; {where} has {as_text(right)!r:.80}"
    raise InputError(f"metrics.{CHOICE}", metrics.choice_accuracy, allowed)


def _parts(sample: Sample) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the tokens up to the last answer and those of that answer; None without a prompt."""
    targets = np.flatnonzero(sample.is_target)
    gaps = np.flatnonzero(np.diff(targets) > 1)
    start = int(targets[gaps[-1] + 1] if len(gaps) else targets[0])
    if start < 2:  # a first token alone is no prompt: it may be BOS
        return None
    return sample.input_ids[:start], sample.input_ids[start : int(targets[-1]) + 1]


def _check_fields(metrics: MetricsConfig, sample: TaskSample, where: str) -> None:
    for name in metrics.fields:
        if field_value(sample.row, name) is MISSING:
            known = ", ".join(map(str, sample.row))
            key = next((k for k, value in metrics.model_dump().items() if value == name), "fields")
            raise InputError(f"metrics.{key}", name, f"must be a field of every sample; {where} has {known}")
    if CHOICE in metrics.names:
        choices_of(metrics, sample, where)


def _check_references(metrics: MetricsConfig, samples: Sequence[TaskSample]) -> None:
    """Raise InputError for a metric that has nothing to compare a sample with, or that no answer could satisfy."""
    for name in (name for name in metrics.names if name in (*COMPARED, "regex")):
        texts = [references(metrics, name, sample.reference, sample.row) for sample in samples]
        value = metrics.field_of(name) or True
        if [] in texts:
            number = texts.index([])
            has = as_text(field_value(samples[number].row, metrics.field_of(name)))
            allowed = f"must be a text, a number or a list of these in every sample; evaluation sample {number + 1} has {has:.60}"
            raise InputError(f"metrics.{'regex_field' if name == 'regex' else name}", value, allowed)
        if why := unusable(name, [text for several in texts for text in several]):
            allowed = f"{why} of the {len(samples)} samples, so all trials would score 0; name the field that has it"
            raise InputError(f"metrics.{name}", value, allowed)


def evaluation_rows(config: DataConfig, tokenizer: Any, wanted: Collection[int], name: str = "") -> dict[int, Mapping[str, Any]]:
    """Return the columns of these rows of an evaluation set's source, by place (see View.row_of).

    InputError if some rows of the source were skipped as bad, as places are not known then, or if
    the samples are held out of a mixture. name: of one of several sets.
    """
    source = evaluation_sources(config)[name]
    if isinstance(source, str) and config.mixture:
        allowed = "metrics that read fields of samples need an evaluation set with a file of its own, not a part of a mixture"
        raise InputError("data.eval", name or config.eval, allowed)
    source = train_sources(config)[""] if isinstance(source, str) else source
    if token_set(source, config, tokenizer)[1].num_bad:
        allowed = "metrics that read fields of samples need a file in which no row is bad; take the bad ones out of it"
        raise InputError("data.bad_rows", config.bad_rows, allowed)
    last = max(wanted, default=-1)
    rows = enumerate(islice(read_rows(source, find_source(source)), last + 1))
    return {place: row.columns for place, row in rows if place in wanted}
