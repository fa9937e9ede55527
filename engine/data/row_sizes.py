"""Round the sizes of rows up, so that few occur and each can be recorded as a CUDA graph.

The size of a padded row is a function of the row, its capacity, its longest sample and the data of its
trial alone. A trial that goes on in another process therefore computes the same rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from engine.data.packing import Batch, Sample, collate, padded
from engine.shape.compute_limits import LENGTH_STEP, documents_of

PARTS = 8  # of the most tokens in a row
# Of a row's tokens. Targets cost the head's matmul, 20 % of a small model's time. Packed rows are
# full, and other rows come in more sizes than it pays to record.
TARGET_PARTS_FULL, TARGET_PARTS = 8, 4
MIN_TOKENS = 128
# Sizes of one trial's rows, or of one evaluation's: as many as are recorded. Rows that are not packed come in 30.
MOST_SIZES = 16
# Of rows that are computed launch by launch. A library of matmuls looks for a kernel at every new
# number of rows, and loads it: steps of Gemma-2-2B take 5 to 8 % more time with rows of any size.
FINE_STEP = 64


@dataclass(frozen=True, order=True)
class Size:
    """Hold the size of a padded row.

    whole: tokens of each sample, if samples of the most tokens fill the row; else 0. Attention over
    such a plain batch has faster kernels on some cards.
    """

    num_tokens: int
    num_targets: int
    num_documents: int
    whole: int = 0

    @classmethod
    def of(cls, batch: Batch, capacity: int, longest: int, coarse: bool = False) -> Size:
        """Return the padded size of `batch`.

        capacity: the most tokens in a row. longest: the most tokens in a sample. coarse: fewer sizes,
        for rows that are computed a few times only.
        """
        return cls.around(batch.num_tokens, batch.num_targets, len(batch.document_lengths), capacity, longest, coarse)

    @classmethod
    def around(
        cls, num_tokens: int, num_targets: int, num_documents: int, capacity: int, longest: int, coarse: bool = False
    ) -> Size:
        """Return the padded size of a row with these numbers, of at most `capacity` tokens, for which memory is planned."""
        tokens = min(_up(num_tokens, max(MIN_TOKENS, -(-capacity // PARTS))), max(num_tokens, capacity))
        parts = TARGET_PARTS_FULL if tokens >= capacity and not coarse else TARGET_PARTS
        targets = min(tokens, _up(max(1, num_targets), max(MIN_TOKENS, tokens // parts)))
        needed = num_documents + _up(tokens - num_tokens, longest) // longest
        is_whole = num_documents * longest == num_tokens == tokens and longest % LENGTH_STEP == 0
        return cls(tokens, targets, documents_of(capacity, needed), longest if is_whole else 0)

    @classmethod
    def fine(cls, batch: Batch, capacity: int, longest: int) -> Size:
        """Return the padded size of a row that is not recorded: multiples of FINE_STEP, within `capacity` tokens."""
        tokens = min(_up(batch.num_tokens, FINE_STEP), max(batch.num_tokens, capacity))
        documents = len(batch.document_lengths) + _up(tokens - batch.num_tokens, longest) // longest
        return cls(tokens, min(tokens, _up(max(1, batch.num_targets), FINE_STEP)), documents)

    @classmethod
    def padded(cls, batch: Batch) -> Size:
        """Return the size of a row that has been padded, `whole` aside."""
        return cls(batch.num_tokens, batch.num_targets, batch.document_offsets.numel() - 1)

    def empty_row(self, longest: int) -> Batch:
        """Return a row of this size without targets, on the host: its loss and all gradients are 0."""
        first = min(longest, self.num_tokens)
        ids, none = np.zeros(first, dtype=np.int32), np.zeros(first, dtype=bool)
        return self.pad(collate([Sample(ids, none)]), longest)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return the lengths of the samples of a `whole` row."""
        return (self.whole,) * (self.num_tokens // self.whole)

    def pad(self, batch: Batch, longest: int) -> Batch:
        """Return the row with filler up to this size."""
        return padded(batch, self.num_tokens, self.num_targets, self.num_documents, longest)

    def holds(self, batch: Batch, longest: int) -> bool:
        """Return True if `batch` can be padded to this size, which is not `whole`."""
        documents = len(batch.document_lengths) + _up(self.num_tokens - batch.num_tokens, longest) // longest
        is_larger = batch.num_tokens <= self.num_tokens and batch.num_targets <= self.num_targets
        return is_larger and documents <= self.num_documents and not self.whole


@dataclass(frozen=True)
class FewSizes:
    """Hold the sizes of all rows of a trial, at most MOST_SIZES, the smallest first.

    A row of a rarer size takes the next of these that holds it. Recording each such row anew took more time
    than its filler does: without packing, two of five rows may have a rare size.
    """

    sizes: tuple[Size, ...] = ()

    @classmethod
    def of(cls, found: Iterable[Size]) -> FewSizes:
        """Return the sizes for rows of these sizes: the most frequent ones, and one that holds all others."""
        counts = Counter(found)
        if len(counts) <= MOST_SIZES:
            return cls(tuple(sorted(counts)))
        numbers = ((size.num_tokens, size.num_targets, size.num_documents) for size in counts)
        largest = Size(*map(max, *numbers))
        return cls(tuple(sorted({largest, *(size for size, _ in counts.most_common(MOST_SIZES - 1))})))

    def size_of(self, batch: Batch, own: Size, longest: int) -> Size:
        """Return the size to which `batch` is padded. own: its size among any others, which a row beyond all sizes keeps."""
        if own in self.sizes:
            return own
        return next((size for size in self.sizes if size.holds(batch, longest)), own)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
