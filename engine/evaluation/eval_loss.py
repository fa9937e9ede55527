"""Compute the losses of the evaluation samples, whose mean per target token is the eval loss.

Every trial of a sweep uses the same set and sequence length. Rows have the same token limit at any
batch size of the trial, and the same filler whether they are recorded or not. The arithmetic
therefore does not depend on the trial. One forward pass gives all losses: those of single targets
go to the host, 4 bytes each, and are added up there in fp64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from engine.data.packing import Batch, collate, plan_once, rows_of
from engine.data.row_sizes import FewSizes, Size
from engine.data.view import AnyView, JoinedView
from engine.model.base import Base
from engine.sample_losses import SampleLosses

# Rows of up to this many tokens in all stay on the device between evaluations: 33 bytes a token.
MAX_TOKENS_ON_DEVICE = 2**20


@dataclass(frozen=True)
class EvaluationSet:
    """Hold the rows of an evaluation, with N samples in all.

    targets_N: the number of tokens that carry loss in each sample, in order. row_targets: the same
    in each row. digest: 16 hex digits of the samples, however they share rows. sets, weights: of
    several evaluation sets, as SampleLosses has them.
    """

    batches: list[Batch]
    targets_N: np.ndarray
    row_targets: list[int]
    digest: str
    sets: dict[str, int] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: list[Batch]) -> EvaluationSet:
        """Return the set that these rows on the host make up, before they are padded."""
        ids, labels, targets, lengths = hashlib.sha256(), hashlib.sha256(), [], []
        for row in rows:
            ids.update(row.input_ids_T.numpy().tobytes())
            labels.update(row.labels_T.numpy().tobytes())
            lengths += row.document_lengths
            before = np.searchsorted(row.target_rows.numpy(), row.document_offsets.numpy())
            targets.append(np.diff(before))
        content = ids.digest() + labels.digest() + np.array(lengths, dtype=np.int64).tobytes()
        return cls(rows, np.concatenate(targets), [int(one.sum()) for one in targets], hashlib.sha256(content).hexdigest()[:16])

    @property
    def num_targets(self) -> int:
        return sum(self.row_targets)

    def losses(self, loss_M: np.ndarray) -> SampleLosses:
        """Return the losses of the samples from those of all their targets, in order."""
        number = len(self.targets_N)
        sums = np.bincount(np.repeat(np.arange(number), self.targets_N), weights=loss_M, minlength=number)
        return SampleLosses(self.digest, tuple(sums.tolist()), tuple(self.targets_N.tolist()), self.sets, self.weights)


def evaluation_batches(base: Base, view: AnyView, eval_max_seq_length: int) -> EvaluationSet:
    """Return the rows of the evaluation set, packed if the model allows it.

    Of several sets, each has rows of its own, so that the others do not change its losses. On CUDA,
    rows that may be padded are (engine/data/row_sizes.py). A small set lies on the device.
    """
    capacity, shares = base.evaluation_row_tokens(eval_max_seq_length), base.shares_rows(eval_max_seq_length)
    sets = view.parts if isinstance(view, JoinedView) and view.weights else {}
    rows = []
    for one in sets.values() or (view,):
        rows += [collate([one[i] for i in row]) for row in rows_of(plan_once(one.lengths, capacity), 1, shares)]
    samples = EvaluationSet.of(rows)
    if sets:
        samples = replace(samples, sets={name: len(one) for name, one in sets.items()}, weights=view.weights)
    batches = samples.batches
    if base.device.type == "cuda" and base.pads_rows(eval_max_seq_length):
        batches = _padded(batches, capacity, eval_max_seq_length)
    if sum(batch.num_tokens for batch in batches) <= MAX_TOKENS_ON_DEVICE:
        batches = [batch.to(base.device) for batch in batches]
    return replace(samples, batches=batches)


def _padded(batches: list[Batch], capacity: int, longest: int) -> list[Batch]:
    own = [Size.of(batch, capacity, longest, coarse=True) for batch in batches]
    few = FewSizes.of(own)
    filled = [few.size_of(batch, size, longest).pad(batch, longest) for batch, size in zip(batches, own, strict=True)]
    return [replace(row, document_lengths=(longest, 0)) for row in filled]


@torch.no_grad()
def evaluate(
    base: Base,
    samples: EvaluationSet,
    before_each: Callable[[], None] = lambda: None,
    losses_of: Callable[[Batch], Tensor] | None = None,
) -> SampleLosses:
    """Return the loss of each of the `samples`; its `mean` is the eval loss in nats per target token.

    The model keeps its training or evaluation mode. before_each: called before each batch; an
    exception from it ends the evaluation. losses_of: computes a row in the place of
    `base.target_losses`, and takes care of the mode.
    """
    was_training, is_cuda = base.model.training, base.device.type == "cuda"
    if losses_of is None:
        base.model.eval()
    # From pinned memory, the host waits for the device only once.
    loss_M, start = torch.empty(samples.num_targets, dtype=torch.float32, pin_memory=is_cuda), 0
    try:
        for batch, count in zip(samples.batches, samples.row_targets, strict=True):
            before_each()
            of_row = base.target_losses(batch.to(base.device)) if losses_of is None else losses_of(batch)
            loss_M[start : start + count].copy_(of_row[:count], non_blocking=True)  # filler comes after the targets
            start += count
    finally:  # who computes again after an error still trains: with dropout
        if losses_of is None:
            base.model.train(was_training)
    if is_cuda:
        torch.cuda.synchronize(base.device)
    return samples.losses(loss_M.numpy())
