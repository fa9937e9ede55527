"""Compute the cross-entropy of rows of logits in Triton, with the gradient in place.

One program handles one row and goes over it twice. The first pass finds maximum and sum. The second
writes the gradient over the logits, so no other tensor of that size exists.

A row does not fit in registers: at V = 128,256 it is 256 KB of bf16. On an H100 two programs run on
each SM, so they work on 264 rows (68 MB) at a time. The L2 cache holds 50 MB. The second pass
therefore goes backwards and starts with the part read last.

Shape letters: C rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.reference import IGNORE

BLOCK_V = 8192
NUM_WARPS = 16  # 16 elements per thread: two 16-byte loads of bf16 in flight
MOST_BOUND = 60.0  # exp(60), exp(-60) and their sums over a vocabulary are numbers in fp32


@triton.jit
def _transform(x, scale, softcap, CAP: tl.constexpr):
    """Return z = scale * x, or softcap * tanh(scale * x / softcap) if CAP, and dz/dx.

    tanh(u) = (1 - e) / (1 + e) with e = exp(-2 u), at most exp(87) so that nothing overflows. Its
    error is one fp32 step at 1, and softcap times that in z. The slope 4 e / (1 + e)^2 keeps all
    its digits where 1 - tanh^2 would cancel.
    """
    z = x.to(tl.float32) * scale
    slope = scale
    if CAP:
        e = tl.exp(tl.minimum(z * (-2.0 / softcap), 87.0, propagate_nan=tl.PropagateNan.ALL))
        r = 1.0 / (1.0 + e)
        z = softcap * ((1.0 - e) * r)
        slope = scale * 4.0 * (e * r) * r
    return z, slope


@triton.jit
def _cross_entropy_kernel(
    logits, labels, loss, stride, scale, softcap, V,
    BLOCK_V: tl.constexpr, CAP: tl.constexpr, BOUND: tl.constexpr, WITH_GRADIENT: tl.constexpr, IGNORED: tl.constexpr,
):  # fmt: skip
    """Write loss = logsumexp(z) - z[label], and the gradient over the logits if WITH_GRADIENT.

    The gradient is (softmax(z) - onehot(label)) * dz/dlogits. A row whose label is IGNORED gets
    loss 0 and gradient 0.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    offsets = tl.arange(0, BLOCK_V)
    label = tl.load(labels + row)
    # Loaded before the reductions below: their barriers keep this load ahead of every store. A
    # label outside [0, V) gives NaN.
    at_label = tl.load(logits + label, mask=(label >= 0) & (label < V), other=float("nan"))
    target = _transform(at_label, scale, softcap, CAP)[0]
    # Each lane keeps its own maximum and sum, so the loop has no reduction and no barrier. One exp
    # per element is enough, because one of exp(z - maximum) and exp(old - new maximum) is 1. The
    # start is -3e38, not -inf: lanes beyond V would compute -inf - (-inf). BOUND values need no
    # maximum: no exp of them overflows or vanishes.
    maximum = tl.full((BLOCK_V,), 0.0 if BOUND else -3e38, tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        columns = start + offsets
        z = _transform(tl.load(logits + columns, mask=columns < V, other=0.0), scale, softcap, CAP)[0]
        z = tl.where(columns < V, z, float("-inf"))
        if BOUND:
            total += tl.exp(z)
        else:
            e = tl.exp(-tl.abs(z - maximum))
            total = tl.where(z > maximum, total * e + 1.0, total + e)
            maximum = tl.maximum(maximum, z)
    top = tl.max(maximum, axis=0)
    total_of_row = tl.sum(total * tl.exp(maximum - top), axis=0)
    # Not (top + log) - target: at 1e4 a step of fp32 is 1e-3.
    value = (top - target) + tl.log(total_of_row)
    tl.store(loss + row, tl.where(label == IGNORED, 0.0, value))
    if WITH_GRADIENT:
        # An ignored label equals no column, so p is 0 in the whole row.
        share = tl.where(label == IGNORED, 0.0, 1.0 / total_of_row)
        last = (V - 1) // BLOCK_V
        for i in range(0, last + 1):
            columns = (last - i) * BLOCK_V + offsets
            z, slope = _transform(tl.load(logits + columns, mask=columns < V, other=0.0), scale, softcap, CAP)
            p = tl.exp(z - top) * share
            p = tl.where(columns == label.to(tl.int32), p - 1.0, p)
            tl.store(logits + columns, (p * slope).to(logits.dtype.element_ty), mask=columns < V)


def cross_entropy_(
    logits_CV: Tensor, labels_C: Tensor, scale: float = 1.0, softcap: float | None = None, with_gradient: bool = True
) -> Tensor:
    num_rows, vocabulary = logits_CV.shape
    loss_C = torch.empty((num_rows,), dtype=torch.float32, device=logits_CV.device)
    if num_rows:
        capped = softcap is not None
        _cross_entropy_kernel[(num_rows,)](
            logits_CV, labels_C, loss_C, logits_CV.stride(0), float(scale), float(softcap) if capped else 1.0, vocabulary,
            BLOCK_V=BLOCK_V, CAP=capped, BOUND=capped and softcap <= MOST_BOUND, WITH_GRADIENT=with_gradient, IGNORED=IGNORE,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return loss_C
