"""Linear cross-entropy: hidden states and head in, loss out, with no logits kept.

Rows without a target are dropped before the head matmul, and the rest goes through in chunks whose logits are reduced to a
loss and a gradient of the hidden states at once: memory is one chunk of logits instead of N x V. The head is frozen, so no
gradient of it is computed. (The idea of Wijmans et al., "Cut Your Losses", arXiv:2411.09009, in plain torch.)

Shape letters: N rows (tokens), D hidden, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
CHUNK_BYTES = 128 * 2**20  # of fp32 logits: 1,024 rows at a vocabulary of 32k, 256 at 128k


@dataclass(frozen=True)
class Head:
    """The frozen output embedding and what the model does to its logits: scale, then softcap * tanh(logits / softcap)."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def linear_cross_entropy(h_ND: Tensor, labels_N: Tensor, head: Head) -> Tensor:
    """Sum over rows of -log softmax(logits)[label], fp32 scalar in nats; rows labelled IGNORE count nothing."""
    return _LinearCrossEntropy.apply(h_ND, labels_N, head)


def linear_cross_entropy_reference(h_ND: Tensor, labels_N: Tensor, head: Head) -> Tensor:
    """The same, read at a glance: all logits in fp32."""
    logits_NV = _cap(_logits(h_ND.float(), head), head)
    return torch.nn.functional.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, labels_N: Tensor, head: Head) -> Tensor:
        rows = (labels_N != IGNORE).nonzero().squeeze(1)
        needs_grad = h_ND.requires_grad
        grad_ND = torch.zeros_like(h_ND) if needs_grad else None
        total = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        rows_per_chunk = max(1, CHUNK_BYTES // (4 * head.weight_VD.shape[0]))
        for chunk in rows.split(rows_per_chunk):
            loss, grad_CD = _chunk(h_ND[chunk], labels_N[chunk], head, needs_grad)
            total += loss
            if grad_ND is not None:
                grad_ND[chunk] = grad_CD
        ctx.save_for_backward(grad_ND)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grad.to(grad_ND.dtype), None, None


def _logits(h_CD: Tensor, head: Head) -> Tensor:
    bias = None if head.bias_V is None else head.bias_V.to(h_CD.dtype)
    logits = torch.nn.functional.linear(h_CD, head.weight_VD.to(h_CD.dtype), bias)
    return logits.float() * head.scale


def _cap(logits: Tensor, head: Head) -> Tensor:
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _chunk(h_CD: Tensor, labels_C: Tensor, head: Head, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Loss of a chunk and, if asked, d loss / d h = (softmax - onehot) * dcap * scale @ W."""
    logits_CV = _cap(_logits(h_CD, head), head)
    lse_C = torch.logsumexp(logits_CV, dim=1)
    index_C1 = labels_C.unsqueeze(1)
    loss = (lse_C - logits_CV.gather(1, index_C1).squeeze(1)).sum()
    if not needs_grad:
        return loss, None
    grad_CV = torch.exp(logits_CV - lse_C.unsqueeze(1))
    grad_CV.scatter_add_(1, index_C1, torch.full_like(index_C1, -1.0, dtype=grad_CV.dtype))
    if head.softcap is not None:
        grad_CV *= 1.0 - (logits_CV / head.softcap) ** 2
    if head.scale != 1.0:
        grad_CV *= head.scale
    return loss, grad_CV.to(h_CD.dtype) @ head.weight_VD.to(h_CD.dtype)
