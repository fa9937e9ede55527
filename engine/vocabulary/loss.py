"""Compute the cross-entropy loss from hidden states and head, without keeping logits.

Rows without a target are dropped before the head matmul. The rest is computed in chunks: the logits
of a chunk are reduced to a loss, and their gradient overwrites them. Memory is one chunk of logits
in the working dtype instead of N x V. The head is frozen, so it gets no gradient.

The idea is from Wijmans et al., "Cut Your Losses", arXiv:2411.09009. Here the vendor's library
still computes the head matmuls.

Shape letters: N rows (tokens), M rows that have a target, D hidden, V vocabulary, C rows of one
chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from engine.kernels import ops
from engine.kernels.ops import IGNORE
from engine.shape.compute_limits import LOSS_CHUNK_BYTES
from engine.vocabulary.head import Head

WEIGHED_ROWS = 2048  # gradients that take their weights at once

def linear_cross_entropy(h_ND: Tensor, labels_N: Tensor, head: Head, rows: Tensor | None = None) -> Tensor:
    """Return the sum over rows of -log softmax(logits)[label], an fp32 scalar in nats.

    Rows labelled IGNORE do not count. `rows` (int64 [M], no duplicates) must contain all other
    rows, and may contain some labelled IGNORE. Pass it if you know it: finding the rows here makes
    the host wait for the device.
    """
    own = None if head.own_rows is None else head.own_rows[1]
    return _LinearCrossEntropy.apply(h_ND, labels_N, head, rows, own)


@torch.no_grad()
def token_cross_entropy(h_ND: Tensor, labels_N: Tensor, head: Head, rows_M: Tensor) -> Tensor:
    """Return -log softmax(logits)[label] of each of the `rows` [M], in nats and fp32.

    It is 0 where the label is IGNORE. Their sum is `linear_cross_entropy`, chunk by chunk the same
    numbers.
    """
    loss_M = torch.empty(rows_M.shape[0], dtype=torch.float32, device=h_ND.device)
    for part, chunk in _chunks(h_ND, head, rows_M):
        loss_M[part] = _chunk(h_ND[chunk], labels_N[chunk], head, needs_grad=False)[0]
    return loss_M[rows_M] if rows_M.shape[0] == h_ND.shape[0] else loss_M  # chunks of all rows go by position


def trained_token_cross_entropy(h_ND: Tensor, labels_N: Tensor, head: Head, rows_M: Tensor) -> Tensor:
    """Return what `token_cross_entropy` returns, with the gradient to h_ND of any function of it.

    The gradient of each loss is computed beside it, and takes its weight in the backward pass: it
    depends on its own row of h_ND alone. So one pass through the head is enough.
    """
    return _TokenCrossEntropy.apply(h_ND, labels_N, head, rows_M)


def linear_cross_entropy_reference(h_ND: Tensor, labels_N: Tensor, head: Head) -> Tensor:
    """Return the same loss by definition, with all logits in fp32."""
    logits_NV = head.logits(h_ND.float()).float() * head.scale
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    return torch.nn.functional.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, labels_N: Tensor, head: Head, rows_M: Tensor | None, own_rows: Tensor | None
    ) -> Tensor:
        if rows_M is None:
            rows_M = (labels_N != IGNORE).nonzero().squeeze(1)
        grad_ND = None
        drows = torch.zeros_like(own_rows) if own_rows is not None and own_rows.requires_grad else None
        if h_ND.requires_grad:
            grad_ND = torch.empty_like(h_ND) if rows_M.shape[0] == h_ND.shape[0] else torch.zeros_like(h_ND)
        total = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        for _, chunk in _chunks(h_ND, head, rows_M):
            loss_C, grad_CD = _chunk(h_ND[chunk], labels_N[chunk], head, grad_ND is not None, drows)
            total += loss_C.sum()
            if grad_ND is not None:
                grad_ND[chunk] = grad_CD
        ctx.save_for_backward(grad_ND, drows)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_ND, drows = ctx.saved_tensors
        # Not in place, because this runs again with retain_graph.
        return grad_ND * grad.to(grad_ND.dtype), None, None, None, None if drows is None else drows * grad


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, labels_N: Tensor, head: Head, rows_M: Tensor) -> Tensor:
        loss_M = torch.empty(rows_M.shape[0], dtype=torch.float32, device=h_ND.device)
        grad_MD = h_ND.new_empty((rows_M.shape[0], h_ND.shape[1])) if h_ND.requires_grad else None
        for part in _parts(rows_M.shape[0], h_ND, head):
            rows = rows_M[part]
            loss_M[part], grad_CD = _chunk(h_ND[rows], labels_N[rows], head, grad_MD is not None)
            if grad_MD is not None:
                grad_MD[part] = grad_CD
        ctx.num_rows = h_ND.shape[0]
        ctx.save_for_backward(grad_MD, rows_M)
        return loss_M

    @staticmethod
    def backward(ctx: Any, weight_M: Tensor) -> tuple[Tensor, None, None, None]:
        grad_MD, rows_M = ctx.saved_tensors
        grad_ND = grad_MD.new_zeros((ctx.num_rows, grad_MD.shape[1]))
        for start in range(0, rows_M.shape[0], WEIGHED_ROWS):  # in parts: a copy of all would double the memory
            part = slice(start, start + WEIGHED_ROWS)
            grad_ND[rows_M[part]] = grad_MD[part] * weight_M[part, None].to(grad_MD.dtype)
        return grad_ND, None, None, None


def _parts(num_rows: int, h_ND: Tensor, head: Head) -> Iterator[slice]:
    rows_per_chunk = max(1, LOSS_CHUNK_BYTES // (h_ND.element_size() * head.weight_VD.shape[0]))
    for start in range(0, num_rows, rows_per_chunk):
        yield slice(start, min(start + rows_per_chunk, num_rows))


def _chunks(h_ND: Tensor, head: Head, rows_M: Tensor) -> Iterator[tuple[slice, slice | Tensor]]:
    """Yield the place of each chunk among the rows with a target, and what selects its rows."""
    every_row = rows_M.shape[0] == h_ND.shape[0]
    for part in _parts(rows_M.shape[0], h_ND, head):
        yield part, part if every_row else rows_M[part]  # a slice is a view: nothing is gathered


def _chunk(
    h_CD: Tensor, labels_C: Tensor, head: Head, needs_grad: bool, drows_ND: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the losses of a chunk and, if asked, d loss / d h = d loss / d logits @ W.

    drows_ND: fp32, to which the gradient of the head's trained rows is added.

    The chunk's logits are free when this returns.
    """
    logits_CV = head.logits(h_CD)
    loss_C = ops.cross_entropy_(logits_CV, labels_C, head.scale, head.softcap, needs_grad)
    return loss_C, head.input_gradient(logits_CV, h_CD, drows_ND) if needs_grad else None
