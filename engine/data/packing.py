"""Pack samples into micro-batches: choose which samples share a row, and build the row.

A bin holds whole samples up to `max_seq_length` tokens, or one sample without packing. The config
sets how many bins an optimizer step takes. A micro-batch puts `micro_batch_size` of them in one
flat row without padding. Its size therefore changes only how much is computed at once.

Samples never see each other: positions restart and attention is cut at the document offsets.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.kernels.ops import IGNORE

# Samples sorted at once: first-fit-decreasing over them fills > 97 % of a row on typical chat data.
WINDOW = 1024

MIXED = 1  # in the seed of a mixture's shuffles, which are others than an epoch's

# The tensors of a Batch.
TENSORS = ("input_ids_T", "labels_T", "target_rows", "position_ids_T", "document_offsets")


@dataclass(frozen=True)
class Sample:
    """Hold one tokenised sample, cut to length: input ids [L], and a mask [L] of the targets."""

    input_ids: np.ndarray
    is_target: np.ndarray


@dataclass(frozen=True)
class Batch:
    """Hold one packed row of T tokens.

    labels_T is already shifted: at position t it has the target predicted there, or IGNORE.
    target_rows [M] are the positions with a target, found on the host so that the loss need not
    wait for the device. document_offsets [documents + 1] start at 0. reference [documents] is the
    reference model's log p of each sample's targets, in nats and fp64, if the loss of pairs needs it.
    """

    input_ids_T: Tensor
    labels_T: Tensor
    target_rows: Tensor
    position_ids_T: Tensor
    document_offsets: Tensor
    document_lengths: tuple[int, ...]
    reference: Tensor | None = None

    @property
    def num_targets(self) -> int:
        return self.target_rows.numel()

    @property
    def num_tokens(self) -> int:
        return self.input_ids_T.numel()

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`; copies to CUDA are asynchronous, from pinned memory."""
        if self.input_ids_T.device.type == device.type:
            return self
        return replace(self, **{n: getattr(self, n).pin_memory().to(device, non_blocking=True) for n in self._tensors()})

    def copy_(self, other: Batch) -> None:
        """Copy in the values of a batch of equal sizes; from host to CUDA asynchronously, as in `to`."""
        for name in self._tensors():
            target, source = getattr(self, name), getattr(other, name)
            target.copy_(source.pin_memory() if target.is_cuda and not source.is_cuda else source, non_blocking=True)


    def _tensors(self) -> tuple[str, ...]:
        return TENSORS if self.reference is None else (*TENSORS, "reference")


def collate(samples: list[Sample], reference: np.ndarray | None = None) -> Batch:
    """Join samples into one row. reference: of each sample, see Batch.

    The last position of each sample predicts nothing, so no label crosses a border.
    """
    lengths = tuple(len(s.input_ids) for s in samples)
    labels = [np.append(np.where(s.is_target[1:], s.input_ids[1:], IGNORE), IGNORE) for s in samples]
    labels_T = np.concatenate(labels).astype(np.int64)
    return Batch(
        input_ids_T=torch.from_numpy(np.concatenate([s.input_ids for s in samples]).astype(np.int64)),
        labels_T=torch.from_numpy(labels_T),
        target_rows=torch.from_numpy(np.flatnonzero(labels_T != IGNORE)),
        position_ids_T=torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])),
        document_offsets=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        document_lengths=lengths,
        reference=None if reference is None else torch.from_numpy(np.asarray(reference, np.float64)),
    )


def rows_of(bins: list[list[int]], size: int, shares_rows: bool) -> list[list[int]]:
    """Return the rows that compute these bins: `size` bins in each, or one sample in each."""
    if not shares_rows:
        return [[i] for one_bin in bins for i in one_bin]
    return [[i for one_bin in bins[start : start + size] for i in one_bin] for start in range(0, len(bins), size)]


def padded(batch: Batch, num_tokens: int, num_targets: int, num_documents: int, longest: int) -> Batch:
    """Return the batch with filler up to these sizes; the filler adds nothing to loss or gradients.

    Filler documents have token 0, no targets and at most `longest` tokens; empty documents follow.
    `target_rows` is filled with rows that have no target. ValueError if the batch is larger than
    the sizes.
    """
    missing = num_tokens - batch.num_tokens
    filler = [min(longest, missing - start) for start in range(0, missing, longest)]
    ends = batch.document_offsets.numpy()[-1] + np.cumsum([0, *filler])
    empty = num_documents - len(batch.document_lengths) - len(filler)
    if missing < 0 or empty < 0 or not batch.num_targets <= num_targets <= num_tokens:
        raise ValueError("a batch can only be padded to more tokens, targets and documents than it has")
    labels = np.append(batch.labels_T.numpy(), np.full(missing, IGNORE))
    others = np.flatnonzero(labels == IGNORE)[: num_targets - batch.num_targets]
    positions = [batch.position_ids_T.numpy(), *(np.arange(n) for n in filler)]
    offsets = np.concatenate([batch.document_offsets.numpy(), ends[1:], np.full(empty, num_tokens)])
    return Batch(
        input_ids_T=torch.from_numpy(np.append(batch.input_ids_T.numpy(), np.zeros(missing, np.int64))),
        labels_T=torch.from_numpy(labels),
        target_rows=torch.from_numpy(np.append(batch.target_rows.numpy(), others)),
        position_ids_T=torch.from_numpy(np.concatenate(positions).astype(np.int64)),
        document_offsets=torch.from_numpy(offsets.astype(np.int32)),
        document_lengths=(*batch.document_lengths, *filler),
        reference=None if batch.reference is None else _filled(batch.reference, num_documents),
    )


def _filled(values: Tensor, number: int) -> Tensor:
    return torch.cat([values, values.new_zeros(number - len(values))])


@dataclass(frozen=True)
class Mixture:
    """Say how often each source gives a sample to one epoch of a mixture.

    An epoch has as many tokens as all sources together. sizes: samples of each source, which follow
    each other. rates: samples that it gives to an epoch, in the mean; whole numbers of them, so that
    no rounding adds up.
    """

    sizes: tuple[int, ...]
    rates: tuple[float, ...]

    @classmethod
    def of(cls, lengths: Sequence[np.ndarray], weights: Sequence[float]) -> Mixture:
        """Return the mixture in which tokens have these weights. lengths: of each source's samples, at least one."""
        total = float(sum(int(one.sum()) for one in lengths))
        means, weight = [float(one.mean()) for one in lengths], math.fsum(weights)
        return cls(tuple(map(len, lengths)), tuple(w / weight * total / mean for w, mean in zip(weights, means, strict=True)))

    def draw(self, seed: int, epoch: int) -> np.ndarray:
        """Return the samples of one epoch, source by source. Each gives all its samples, shuffled, before any again.

        Nothing but seed and epoch decides, so an epoch is found again without those before it.
        """
        drawn, start = [], 0
        for source, (size, rate) in enumerate(zip(self.sizes, self.rates, strict=True)):
            first, last = math.floor(epoch * rate), math.floor((epoch + 1) * rate)
            rounds = range(first // size, -(-last // size)) if last > first else ()
            shuffled = [np.random.default_rng([seed, number, source, MIXED]).permutation(size) for number in rounds]
            if shuffled:
                begin = rounds.start * size
                drawn.append(start + np.concatenate(shuffled)[first - begin : last - begin])
            start += size
        return np.concatenate(drawn)


def plan_epoch(
    lengths: np.ndarray, capacity: int, packing: bool, seed: int, epoch: int, mixture: Mixture | None = None
) -> list[list[int]]:
    """Return bins of sample indices for one epoch: every sample once, or those that a mixture draws.

    Only seed and epoch decide the order.
    """
    random = np.random.default_rng([seed, epoch])
    if mixture is None:
        order = random.permutation(len(lengths))
    else:
        drawn = mixture.draw(seed, epoch)
        order = drawn[random.permutation(len(drawn))]
    if not packing:
        return [[int(i)] for i in order]
    bins: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        bins += _first_fit_decreasing(order[start : start + WINDOW], lengths, capacity)
    return [bins[i] for i in random.permutation(len(bins))]


def plan_once(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Return bins for evaluation: neighbours share a row while they fit, without a shuffle."""
    bins: list[list[int]] = []
    room = 0
    for i, length in enumerate(lengths):
        if length > room:
            bins.append([])
            room = capacity
        bins[-1].append(i)
        room -= int(length)
    return bins


class Cursor:
    """Walk through the bins, epoch after epoch.

    To resume, a trial needs only `epoch` and `position` (in bins).
    """

    def __init__(self, lengths: np.ndarray, capacity: int, packing: bool, seed: int, mixture: Mixture | None = None) -> None:
        self._given = lengths, capacity, packing, seed
        self._mixture = mixture
        self.epoch, self.position = 0, 0
        self._first = self._bins = plan_epoch(*self._given, 0, mixture)

    @property
    def epochs(self) -> float:
        """Return the number of passes over the data so far, as a fraction."""
        return self.epoch + self.position / len(self._bins)

    def seek(self, epoch: int, position: int) -> None:
        """Go to a place that an earlier cursor reported as `epoch` and `position`."""
        if epoch != self.epoch:
            self._bins = plan_epoch(*self._given, epoch, self._mixture)
        self.epoch, self.position = epoch, position

    def from_start(self) -> Cursor:
        """Return another cursor, at the first bin of the first epoch."""
        other = copy.copy(self)
        other.epoch, other.position, other._bins = 0, 0, self._first
        return other

    def take(self, count: int) -> list[list[int]]:
        """Return the next `count` bins of sample indices; they may run into the next epoch."""
        taken: list[list[int]] = []
        while len(taken) < count:
            if self.position >= len(self._bins):
                self.seek(self.epoch + 1, 0)
            chosen = self._bins[self.position : self.position + count - len(taken)]
            self.position += len(chosen)
            taken += chosen
        return taken


def _first_fit_decreasing(indices: np.ndarray, lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Put each sample, the longest first, into the first bin with room for it."""
    sizes = lengths[indices]
    order = np.lexsort((indices, -sizes))
    bins: list[list[int]] = []
    room = np.full(len(indices) + 1, np.iinfo(np.int64).max)  # a bin that is not open yet takes any sample
    for i, size in zip(indices[order].tolist(), sizes[order].tolist()):
        slot = int((room[: len(bins) + 1] >= size).argmax())
        if slot == len(bins):
            bins.append([])
            room[slot] = capacity
        bins[slot].append(i)
        room[slot] -= size
    return bins
