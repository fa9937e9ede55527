"""Compute the evaluation loss in mean nats per target token.

Every trial of a sweep uses the same set and sequence length. Rows have the same token limit at any
batch size of the trial, and the same filler whether they are recorded or not. The arithmetic
therefore does not depend on the trial.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.data.packing import Batch, collate, plan_once, rows_of
from engine.data.row_sizes import Size
from engine.data.views import View
from engine.model.base import Base
from engine.shape.compute_limits import EVALUATION_ROW_TOKENS

# Rows of up to this many tokens in all stay on the device between evaluations: 33 bytes a token.
MAX_TOKENS_ON_DEVICE = 2**20


@dataclass(frozen=True)
class EvaluationSet:
    """Hold the rows of an evaluation, and the number of tokens that carry loss in them."""

    batches: list[Batch]
    num_targets: int


def evaluation_batches(base: Base, view: View, eval_max_seq_length: int) -> EvaluationSet:
    """Return the rows of the evaluation set, packed if the model allows it.

    On CUDA, rows that may be padded are (engine/data/row_sizes.py). A small set lies on the device.
    """
    capacity = row_capacity(eval_max_seq_length)
    rows = rows_of(plan_once(view.lengths, capacity), 1, base.shares_rows(eval_max_seq_length))
    batches = [collate([view[i] for i in row]) for row in rows]
    num_targets = sum(batch.num_targets for batch in batches)
    if base.device.type == "cuda" and base.pads_rows(eval_max_seq_length):
        padded = [Size.of(batch, capacity, eval_max_seq_length, coarse=True).pad(batch, eval_max_seq_length) for batch in batches]
        batches = [replace(batch, document_lengths=(eval_max_seq_length, 0)) for batch in padded]
    if sum(batch.num_tokens for batch in batches) <= MAX_TOKENS_ON_DEVICE:
        batches = [batch.to(base.device) for batch in batches]
    return EvaluationSet(batches, num_targets)


def row_capacity(eval_max_seq_length: int) -> int:
    """Return the most tokens in a row of the evaluation."""
    return max(eval_max_seq_length, EVALUATION_ROW_TOKENS)


@torch.no_grad()
def evaluate(
    base: Base,
    samples: EvaluationSet,
    before_each: Callable[[], None] = lambda: None,
    loss_of: Callable[[Batch], Tensor] | None = None,
) -> float:
    """Return the mean loss over `samples` in nats per target token.

    The model keeps its training or evaluation mode. before_each: called before each batch; an
    exception from it ends the evaluation. loss_of: computes a row in the place of `base.loss`, and
    takes care of the mode.
    """
    was_training = base.model.training
    if loss_of is None:
        base.model.eval()
    total = torch.zeros((), dtype=torch.float64, device=base.device)
    try:
        for batch in samples.batches:
            before_each()
            total += base.loss(batch.to(base.device)) if loss_of is None else loss_of(batch)
    finally:  # who computes again after an error still trains: with dropout
        if loss_of is None:
            base.model.train(was_training)
    return total.item() / samples.num_targets
