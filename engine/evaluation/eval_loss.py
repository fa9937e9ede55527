"""Compute the evaluation loss in mean nats per target token.

Every trial of a sweep uses the same set and sequence length. Rows have the same token limit at any
batch size of the trial, so the arithmetic does not depend on the trial.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.data.packing import Batch, collate, plan_once, rows_of
from engine.data.views import View
from engine.model.base import Base
from engine.shape.compute_limits import EVALUATION_ROW_TOKENS


def evaluation_batches(base: Base, view: View, eval_max_seq_length: int) -> list[Batch]:
    """Return the rows of the evaluation set, on the host, packed if the model allows it."""
    capacity = max(eval_max_seq_length, EVALUATION_ROW_TOKENS)
    rows = rows_of(plan_once(view.lengths, capacity), 1, base.shares_rows(eval_max_seq_length))
    return [collate([view[i] for i in row]) for row in rows]


@torch.no_grad()
def evaluate(base: Base, batches: list[Batch], before_each: Callable[[], None] = lambda: None) -> float:
    """Return the mean loss over `batches` in nats per target token.

    The model keeps its training or evaluation mode. before_each: called before each batch; an
    exception from it ends the evaluation.
    """
    was_training = base.model.training
    base.model.eval()
    total = torch.zeros((), dtype=torch.float64, device=base.device)
    for batch in batches:
        before_each()
        total += base.loss(batch.to(base.device))
    base.model.train(was_training)
    return total.item() / sum(batch.num_targets for batch in batches)
