"""Tell which of several choices a model finds likeliest behind a prompt, without generating.

Each choice is a sample whose choice alone carries loss, so the losses of an evaluation are the
negative log-likelihoods. Nothing is divided by a choice's length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engine.config.metrics_section import MetricsConfig
from engine.data.packing import Sample, collate, plan_once, rows_of
from engine.evaluation.eval_loss import EvaluationSet, evaluate
from engine.evaluation.task_samples import TaskSample, choices_of
from engine.model.base import Base
from engine.shape.compute_limits import EVALUATION_ROW_TOKENS


def choice_scores(
    base: Base, metrics: MetricsConfig, samples: Sequence[TaskSample], before_each: Callable[[], None]
) -> tuple[list[float], list[str]]:
    """Return for each sample 1 if the right choice is the likeliest, and the choice that is.

    Of equally likely ones the first counts.
    """
    asked = [choices_of(metrics, sample, f"evaluation sample {n}") for n, sample in enumerate(samples, 1)]
    items = [_sample(base.tokenizer, sample, text) for sample, (texts, _) in zip(samples, asked) for text in texts]
    losses = _losses(base, items, before_each)
    scores, likeliest, start = [], [], 0
    for texts, right in asked:
        best = int(np.argmin(losses[start : start + len(texts)]))
        scores.append(float(best == right))
        likeliest.append(texts[best])
        start += len(texts)
    return scores, likeliest


def _sample(tokenizer: Any, sample: TaskSample, choice: str) -> Sample:
    """Return the prompt with the choice as its answer, written with the white space that answers begin with."""
    lead = sample.reference[: len(sample.reference) - len(sample.reference.lstrip())]
    ids = tokenizer(lead + choice, add_special_tokens=False)["input_ids"]
    whole = np.concatenate([sample.prompt, np.asarray(ids, dtype=sample.prompt.dtype)])
    return Sample(whole, np.arange(len(whole)) >= len(sample.prompt))


def _losses(base: Base, items: list[Sample], before_each: Callable[[], None]) -> np.ndarray:
    """Return -log p of each item's targets, in the order of the items."""
    lengths = np.array([len(item.input_ids) for item in items])
    longest = int(lengths.max())
    rows = rows_of(plan_once(lengths, max(longest, EVALUATION_ROW_TOKENS)), 1, base.shares_rows(longest))
    found = evaluate(base, EvaluationSet.of([collate([items[i] for i in row]) for row in rows]), before_each)
    sums = np.empty(len(items))
    sums[[i for row in rows for i in row]] = found.sums
    return sums
