"""Tell which of several choices a model finds likeliest behind a prompt, without generating.

Each choice is a sample whose choice alone carries loss, so the losses of an evaluation are the
negative log-likelihoods. Nothing is divided by a choice's length. The token that ends the answer in
the data is part of each choice: without it 10 could never be likelier than 1.
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


def choice_scores(
    base: Base, metrics: MetricsConfig, samples: Sequence[TaskSample], before_each: Callable[[], None]
) -> tuple[list[float], list[str]]:
    """Return for each sample 1 if the right choice is the likeliest, and the choice that is.

    Of equally likely ones the first counts.
    """
    asked = [choices_of(metrics, sample, f"evaluation sample {n}") for n, sample in enumerate(samples, 1)]
    items = [one for sample, (texts, _) in zip(samples, asked) for one in samples_of_choices(base.tokenizer, sample, texts)]
    losses = _losses(base, items, before_each)
    scores, likeliest, start = [], [], 0
    for texts, right in asked:
        best = int(np.argmin(losses[start : start + len(texts)]))
        scores.append(float(best == right))
        likeliest.append(texts[best])
        start += len(texts)
    return scores, likeliest


def samples_of_choices(tokenizer: Any, sample: TaskSample, choices: Sequence[str]) -> list[Sample]:
    """Return the prompt with each choice as its answer, tokenised and ended as the answer in the data is."""
    answer, special = sample.answer.tolist(), set(tokenizer.all_special_ids)
    ends = next((i for i, token in enumerate(reversed(answer)) if token not in special), 0)
    way, found = _way(tokenizer, answer, sample.reference), []
    for choice in choices:
        ids = [*_ids(tokenizer, choice, *way), *answer[len(answer) - ends :]]
        whole = np.concatenate([sample.prompt, np.asarray(ids, dtype=sample.prompt.dtype)])
        found.append(Sample(whole, np.arange(len(whole)) >= len(sample.prompt)))
    return found


def _way(tokenizer: Any, answer: list[int], reference: str) -> tuple[str, bool]:
    """Return the white space before answers, and whether they are tokenised behind a line end, as the data is.

    Some tokenizers put a blank before a text, and some drop one in decoding.
    """
    lead = reference[: len(reference) - len(reference.lstrip())]
    ways = [(start, behind) for start in dict.fromkeys((lead, " ")) for behind in (False, True)]
    written = {way: _ids(tokenizer, reference.strip(), *way) for way in ways}
    return next((way for way, ids in written.items() if ids and answer[: len(ids)] == ids), ways[0])


def _ids(tokenizer: Any, text: str, lead: str, behind: bool) -> list[int]:
    """Return the token ids of a text; `behind`: those that it has behind a line end, if that stays a token of its own."""
    plain, newline, whole = tokenizer([lead + text, "\n", "\n" + lead + text], add_special_tokens=False)["input_ids"]
    return whole[len(newline) :] if behind and whole[: len(newline)] == newline else plain


def _losses(base: Base, items: list[Sample], before_each: Callable[[], None]) -> np.ndarray:
    """Return -log p of each item's targets, in the order of the items."""
    lengths = np.array([len(item.input_ids) for item in items])
    longest = int(lengths.max())
    rows = rows_of(plan_once(lengths, base.evaluation_row_tokens(longest)), 1, base.shares_rows(longest))
    found = evaluate(base, EvaluationSet.of([collate([items[i] for i in row]) for row in rows]), before_each)
    sums = np.empty(len(items))
    sums[[i for row in rows for i in row]] = found.sums
    return sums
