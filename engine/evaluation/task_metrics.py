"""Measure an adapter by a task: generate answers, score them, and tell the likeliest of choices."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.config.metrics_section import CHOICE
from engine.config.trial import TrainConfig
from engine.data.view import AnyView
from engine.errors import InputError
from engine.evaluation.choice_losses import choice_scores
from engine.evaluation.decoding import Decoding, generate, stop_tokens
from engine.evaluation.task_samples import TaskSample, task_samples
from engine.model.base import Base
from engine.model.device import free
from engine.scoring.answers_file import RungAnswers, TaskAnswer, samples_digest
from engine.scoring.own_function import Answered, OwnMetricError, find_function, own_scores
from engine.scoring.scorer import Scores, score_answers


@dataclass(frozen=True)
class TaskScores:
    """Hold what one adapter scored.

    means: metric -> mean over the samples. error: one line on metrics without a score, or None.
    answers: of each sample. seconds: the time that all of it took.
    """

    means: dict[str, float]
    error: str | None
    answers: tuple[TaskAnswer, ...]
    digest: str
    seconds: float

    def at(self, rung: int) -> RungAnswers:
        """Return the answers as those of a rung."""
        return RungAnswers(rung, self.digest, self.answers)


class TaskMetrics:
    """Hold the samples of a trial's metrics."""

    def __init__(self, config: TrainConfig, base: Base, view: AnyView) -> None:
        """Read the samples. Raises InputError if they do not fit the metrics."""
        self._metrics, self._base = config.metrics, base
        self._num_rungs = len(config.train.report_grid())
        self._samples = task_samples(config, view, base.tokenizer)
        self._how = Decoding(
            config.metrics.max_new_tokens, config.metrics.batch_size, config.metrics.temperature, config.train.seed
        )

    @classmethod
    def of(cls, config: TrainConfig, base: Base, view: AnyView) -> TaskMetrics | None:
        """Return the metrics of a trial, or None if it measures none at its rungs."""
        return cls(config, base, view) if config.metrics.num_due(len(config.train.report_grid())) else None

    def is_due(self, rung: int) -> bool:
        """Return whether a trial measures at this rung."""
        return self._metrics.is_due(rung, self._num_rungs)

    def measure(self, before_each: Callable[[], None] = lambda: None) -> TaskScores:
        """Score the adapter that is attached now. The model, its mode and its random numbers stay as they are.

        before_each: called before each step and row; an exception from it ends the measurement. A
        fault of a metric is in the result, not raised; memory that runs out is such a fault.
        """
        began_s = time.perf_counter()
        texts: Sequence[str] = [""] * len(self._samples)
        choices: Sequence[str | None] = [None] * len(self._samples)
        by_sample: dict[str, Sequence[float]] = {}
        errors: dict[str, str] = {}
        if self._metrics.generates:
            answered = self._with_room(errors, "generation", lambda: self._answers(before_each))
            if answered is not None:
                texts = answered
                scored = score_answers(self._metrics, [_answered(*pair) for pair in zip(self._samples, texts, strict=True)])
                by_sample |= scored.by_sample
                errors |= scored.errors
        if CHOICE in self._metrics.names:
            judged = self._with_room(errors, CHOICE, lambda: choice_scores(self._base, self._metrics, self._samples, before_each))
            if judged is not None:
                by_sample[CHOICE], choices = judged
        scores = Scores({name: by_sample[name] for name in self._metrics.names if name in by_sample}, errors)
        answers = tuple(
            TaskAnswer(sample.text, sample.reference, texts[i], choices[i], {n: s[i] for n, s in scores.by_sample.items()})
            for i, sample in enumerate(self._samples)
        )
        if self._base.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._base.device)  # a plan predicts the peak of training
        digest = samples_digest([(sample.text, sample.reference) for sample in self._samples])
        return TaskScores(scores.means, "; ".join(errors.values()) or None, answers, digest, time.perf_counter() - began_s)

    def _answers(self, before_each: Callable[[], None]) -> list[str]:
        stops = stop_tokens(self._base, [sample.answer for sample in self._samples])
        found = generate(self._base, [sample.prompt for sample in self._samples], stops, self._how, before_each)
        return [self._base.tokenizer.decode(ids, skip_special_tokens=True) for ids in found]

    def _with_room(self, errors: dict[str, str], what: str, compute: Callable[[], Any]) -> Any:
        try:
            return compute()
        except torch.OutOfMemoryError:
            errors[what] = f"{what} ran out of memory with one answer at once; lower metrics.max_new_tokens or leave it out"
        free(self._base.device)
        return None


def _answered(sample: TaskSample, answer: str) -> Answered:
    return Answered(sample.text, sample.reference, answer, dict(sample.row))


def check_metrics(config: TrainConfig, view: AnyView, tokenizer: Any) -> tuple[int, int]:
    """Check that the samples and the user's functions fit the metrics, without a model.

    Each function scores the first sample's own reference once. Returns the number of samples, and
    the tokens of the longest prompt. Raises InputError.
    """
    samples = task_samples(config, view, tokenizer)
    first = [_answered(samples[0], samples[0].reference)]
    for name, metric in config.metrics.own.items():
        find_function(name, metric)
        try:
            own_scores(name, metric, first, config.metrics.function_timeout_s)
        except OwnMetricError as error:
            why = str(error).partition("gave no score: ")[2]
            allowed = f"must score an answer, and fails on the first sample's own reference: {why}"
            raise InputError(f"metrics.{name}", metric.function, allowed) from None
    return len(samples), max(len(sample.prompt) for sample in samples)
