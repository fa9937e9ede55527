"""Record forward and backward of a micro-batch as CUDA graphs, one for each row size.

A graph replays in one launch. A fused layer takes about 60 launches forward and backward (counted:
1,859 for 30 layers, without copies). With short rows and small models the host needs longer for the
launches than the device for the work. On one host, SmolLM2-135M at 512 tokens spent 160 ms on
launches for 9 ms of work.

Rows are padded so that few sizes occur: tokens and targets to multiples of an eighth of the largest
row, documents to a power of two. The first row of a size is computed normally and then recorded.
Graphs read what changes between rows from fixed tensors: inputs, offsets, the number of targets and
the adapter. They add to the adapter's gradient in place.

The plan uses no graphs with dropout, whose masks the host seeds, or with copies to host memory. The
fp32 loss of a padded row equals that of the row up to rounding.
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
from engine.layers.swap import has_mixers
from engine.model.base import Base

# Recording a graph takes some tenths of a second, and each graph has its own nodes in memory. Rows
# of further sizes are computed without graphs.
MAX_GRAPHS = 16
PARTS = 8
MIN_TOKENS, MIN_DOCUMENTS = 128, 8


@dataclass(frozen=True)
class Size:
    """Hold the size of a padded row."""

    num_tokens: int
    num_targets: int
    num_documents: int

    @classmethod
    def of(cls, batch: Batch, capacity: int, longest: int) -> Size:
        """Return the padded size of `batch`.

        capacity: the most tokens in a row. longest: the most tokens in a sample.
        """
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
    """Hold the recorded graphs of one trial under one plan."""

    def __init__(self, base: Base, capacity: int, longest: int) -> None:
        """Start without graphs. capacity, longest: most tokens in a row and in a sample."""
        self._base, self._capacity, self._longest = base, capacity, longest
        self._recorded: dict[Size, _Recorded] = {}
        self._pool = torch.cuda.graph_pool_handle() if base.device.type == "cuda" else None

    def backward(self, batch: Batch, num_targets: int) -> Tensor:
        """Add the gradient of loss / num_targets to the adapter's gradient, and return the loss.

        `batch` must be on the host. The loss is an fp32 scalar in nats, valid until the next call.
        """
        size = Size.of(batch, self._capacity, self._longest)
        row, known = size.pad(batch, self._longest), self._recorded.get(size)
        if self._pool is not None:
            # Attention asks only for the longest document, so an upper bound serves all rows.
            row = replace(row, document_lengths=(self._longest, 0))
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
        """Compute a row, then record its graph: recording alone computes nothing."""
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
        except RuntimeError as error:  # model code waits for the device: no graphs, same numbers
            warnings.warn(f"no CUDA graphs for this model: {first_line(error)}", stacklevel=2)
            self._pool, known.loss = None, first
            return
        known.loss.copy_(first)
        known.graph = graph


def make_graphs(base: Base, capacity: int, longest: int) -> Graphs | None:
    """Return graphs for `base`, or None if its attention, mixers, rows or an unfused layer rule them out."""
    softcap = getattr(base.model.config.get_text_config(), "attn_logit_softcapping", None)
    recordable = base.device.type == "cpu" or attention.reads_offsets_only(base.dtype, softcap)
    recordable = recordable and not base.swaps.unfused and not has_mixers(base.model) and base.shares_rows(longest)
    return Graphs(base, capacity, longest) if recordable else None


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream on which all first rows are computed.

    cuBLAS takes 2 x 32 MiB (Hopper) for every stream it is used on and never releases them. With
    one stream for each recording, 50 trials left 2 GiB behind.
    """
    return torch.cuda.Stream(device)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
