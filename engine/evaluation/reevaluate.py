"""Measure an adapter again from its files, next to its base model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.adapter.lora import attach, detach
from engine.adapter.peft_files import load_adapter
from engine.command_answers import AdapterEvaluation
from engine.config.trial import TrainConfig
from engine.data.views import load_recorded
from engine.errors import first_line
from engine.evaluation.eval_loss import evaluate, evaluation_batches
from engine.evaluation.examples import choose_questions, write_examples
from engine.evaluation.task_metrics import TaskMetrics
from engine.model.device import pick_device
from engine.model.load import load_base
from engine.preference.trial_pairs import judged


def evaluate_adapter(
    config: TrainConfig, adapter: Path, num_examples: int = 0, inputs: Mapping[str, str] | None = None
) -> AdapterEvaluation:
    """Load base model and exported adapter from disk, and measure both on the evaluation set.

    Losses are in nats per target token. num_examples: how many evaluation samples both answer; they
    are among the answers that the task metrics score, if these need answers. If
    generating fails, the result has `examples_error` instead: the losses are measured by then.
    inputs: the digests that the sweep recorded; InputsChanged if the inputs are others now.
    """
    base = load_base(config.model, pick_device(config.train.device))
    _, view = load_recorded(config, base.tokenizer, inputs)
    samples, judge = evaluation_batches(base, view, config.data.eval_max_seq_length), judged(config, base, view)
    base_losses = judge(evaluate(base, samples))
    task = TaskMetrics(config, base, view) if config.metrics.names else None
    base_scores = task and task.measure()
    layers = attach(base.model, base.linear_names, config.lora, config.train.seed)
    load_adapter(adapter, layers)
    adapter_losses = judge(evaluate(base, samples))
    answered: dict[str, Any] = {"base_sample_losses": base_losses, "sample_losses": adapter_losses}
    scores = task and task.measure()
    means = base_losses.preference_metrics, adapter_losses.preference_metrics
    if scores:
        means = means[0] | base_scores.means, means[1] | scores.means
        answered |= {"metrics_error": scores.error or base_scores.error}
    if means[1]:
        answered |= {"base_metrics": means[0], "metrics": means[1]}
    if num_examples and scores and config.metrics.generates:
        pairs = zip(base_scores.answers[:num_examples], scores.answers, strict=False)
        examples = [{"prompt": b.prompt, "expected": b.reference, "base": b.answer, "adapter": a.answer} for b, a in pairs]
        answered |= {"examples": examples, "examples_s": scores.seconds + base_scores.seconds}
    elif num_examples:
        try:
            started_s = time.perf_counter()
            examples = write_examples(base, choose_questions(view, num_examples), lambda: detach(base.model, layers))
            answered |= {"examples": examples, "examples_s": time.perf_counter() - started_s}
        # a model with custom code may lack generate(), and memory may run out
        except Exception as error:
            answered |= {"examples_error": f"{type(error).__name__}: {first_line(error)}"}
    return AdapterEvaluation(base_losses.mean, adapter_losses.mean, samples.num_targets, **answered)
