"""Evaluation: mean nats per target token of one fixed set at one fixed length, the same for every trial of a sweep.

Rows hold up to the same number of tokens whatever the trial's own batch is, so the arithmetic does not depend on the trial.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.adapter_files import load_adapter
from engine.config import TrainConfig
from engine.data import View, load_data
from engine.errors import first_line
from engine.examples import choose_questions, write_examples
from engine.lora import attach, detach
from engine.model import Base, load_base, pick_device
from engine.packing import Batch, collate, plan_once

# Samples share rows of at least this many tokens: on an H100 a row of 256 tokens took 140 ms of launches for 3 ms of work.
MIN_ROW_TOKENS = 4096


def evaluation_batches(view: View, eval_max_seq_length: int) -> list[Batch]:
    """The rows of the evaluation set, on the host."""
    capacity = max(eval_max_seq_length, MIN_ROW_TOKENS)
    return [collate([view[i] for i in row]) for row in plan_once(view.lengths, capacity)]


@torch.no_grad()
def evaluate(base: Base, batches: list[Batch], before_each: Callable[[], None] = lambda: None) -> float:
    """Mean loss in nats per target token over `batches`. Leaves the model in the mode it was in. before_each: called before each
    batch; what it raises ends the evaluation."""
    was_training = base.model.training
    base.model.eval()
    total = torch.zeros((), dtype=torch.float64, device=base.device)
    for batch in batches:
        before_each()
        total += base.loss(batch.to(base.device))
    base.model.train(was_training)
    return total.item() / sum(batch.num_targets for batch in batches)


def evaluate_adapter(config: TrainConfig, adapter: Path, num_examples: int = 0) -> dict[str, Any]:
    """Load base model and exported adapter afresh; the base's loss and the adapter's on the config's evaluation set.

    num_examples: evaluation samples that both answer, as `examples`. Where that fails there is `examples_error`, one line, in
    their place: the losses are measured by then.
    """
    base = load_base(config.model, pick_device(config.train.device))
    _, view = load_data(config.data, base.tokenizer)
    batches = evaluation_batches(view, config.data.eval_max_seq_length)
    base_loss = evaluate(base, batches)
    layers = attach(base.model, base.linear_names, config.lora, config.train.seed)
    load_adapter(adapter, layers)
    adapter_loss = evaluate(base, batches)
    targets = sum(batch.num_targets for batch in batches)
    measured = {"base_eval_loss": base_loss, "eval_loss": adapter_loss, "num_eval_target_tokens": targets}
    if num_examples:
        try:
            started_s = time.perf_counter()
            examples = write_examples(base, choose_questions(view, num_examples), lambda: detach(base.model, layers))
            measured |= {"examples": examples, "examples_s": time.perf_counter() - started_s}
        except Exception as error:  # a model of its own code may know no generate; memory may run out
            measured["examples_error"] = f"{type(error).__name__}: {first_line(error)}"
    return measured
