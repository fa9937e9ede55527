"""Forward and backward of a micro-batch as one CUDA graph: recorded once for each size of row, replayed in one launch.

A fused layer is some 60 launches forward and backward (counted: 1,859 of 30 layers, copies left out). Where the host needs longer
for them than the device for the work, short rows of small models, the device waits: SmolLM2-135M at 512 tokens took 160 ms of
launches on one host for 9 ms of work.

Rows are padded, so that few sizes occur: tokens and targets to an eighth of the largest row, documents to a power of two. The
first row of a size is computed as ever, and recorded on the way. What changes from row to row is read from fixed tensors:
inputs, offsets, the number of targets, and the adapter, whose gradient is added to in place. Dropout draws its masks on the
host's word and is left out, as are copies to host memory; the loss in fp32 of a padded row is that of the row up to rounding.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.data.packing import Batch, padded
from engine.errors import first_line
from engine.layers import attention
from engine.model.base import Base

MAX_GRAPHS = 16  # each takes some tenths of a second and its own nodes; sizes beyond are computed as ever
PARTS = 8
MIN_TOKENS, MIN_DOCUMENTS = 128, 8


@dataclass(frozen=True)
class Size:
    """Of a padded row."""

    num_tokens: int
    num_targets: int
    num_documents: int

    @classmethod
    def of(cls, batch: Batch, capacity: int, longest: int) -> Size:
        """The padded size of `batch`, where rows have up to `capacity` tokens and samples up to `longest`."""
        step = max(MIN_TOKENS, capacity // PARTS)
        num_tokens = _up(batch.num_tokens, step)
        filler = _up(num_tokens - batch.num_tokens, longest) // longest
        num_documents = max(MIN_DOCUMENTS, 1 << (len(batch.document_lengths) + filler - 1).bit_length())
        return cls(num_tokens, min(num_tokens, _up(max(1, batch.num_targets), step)), num_documents)

    def pad(self, batch: Batch, longest: int) -> Batch:
        return padded(batch, self.num_tokens, self.num_targets, self.num_documents, longest)


@dataclass
class _Recorded:
    batch: Batch
    divisor: Tensor
    loss: Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None


class Graphs:
    """The recordings of one trial under one plan."""

    def __init__(self, base: Base, capacity: int, longest: int) -> None:
        """capacity: tokens of the largest row; longest: of the longest sample."""
        self._base, self._capacity, self._longest = base, capacity, longest
        self._recorded: dict[Size, _Recorded] = {}
        self._pool = torch.cuda.graph_pool_handle() if base.device.type == "cuda" else None

    def backward(self, batch: Batch, num_targets: int) -> Tensor:
        """Add the gradient of loss / num_targets to the adapter's; `batch` is on the host. Returns the loss, fp32 scalar in nats,
        good until the next call."""
        size = Size.of(batch, self._capacity, self._longest)
        row, known = size.pad(batch, self._longest), self._recorded.get(size)
        if self._pool is not None:
            row = replace(row, document_lengths=(self._longest, 0))  # bounds, for attention that asks for the longest alone
        if known is None:
            known = _Recorded(row.to(self._base.device), torch.zeros((), device=self._base.device))
        else:
            known.batch.copy_(row)
        known.divisor.fill_(num_targets)
        if known.graph is not None:
            known.graph.replay()
        elif self._pool is None or len(self._recorded) >= MAX_GRAPHS:
            known.loss = self._compute(known)
        else:
            self._first(known)
            if known.graph is not None:
                self._recorded[size] = known
        return known.loss

    def _compute(self, row: _Recorded) -> Tensor:
        loss = self._base.loss(row.batch)
        (loss / row.divisor).backward()
        return loss.detach()

    def _first(self, known: _Recorded) -> None:
        """Compute a row, then record how: a recording itself computes nothing."""
        side = _side_stream(self._base.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            first = self._compute(known)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                known.loss = self._compute(known)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a model's own code waits for the device somewhere: as slow as without graphs, not wrong
            warnings.warn(f"no CUDA graphs for this model: {first_line(error)}", stacklevel=2)
            self._pool, known.loss = None, first
            return
        known.loss.copy_(first)
        known.graph = graph


def make_graphs(base: Base, capacity: int, longest: int) -> Graphs | None:
    """None where attention on this device is more than one launch."""
    softcap = getattr(base.model.config.get_text_config(), "attn_logit_softcapping", None)
    recordable = base.device.type == "cpu" or attention.reads_offsets_only(base.dtype, softcap)
    return Graphs(base, capacity, longest) if recordable and not base.swaps.unfused else None


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where first rows are computed: one for all, because cuBLAS takes 2 x 32 MiB (Hopper) for each stream that it is ever used
    on, and gives nothing back. With one for each recording, 50 trials left 2 GiB behind."""
    return torch.cuda.Stream(device)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
