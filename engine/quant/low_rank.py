"""Approximate a weight by two factors of low rank: the start of PiSSA and of LoftQ.

Shape letters: D input features, O output features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_UP_TO = 1024  # features on the shorter side; a whole SVD of 4096 x 14336 takes minutes
ITERATIONS, OVERSAMPLED = 16, 8


@torch.no_grad()
def principal_factors(weight_OD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A [R, D] and B [O, R] in fp32, so that B A is the best approximation of the weight by this rank.

    Each has the square roots of the singular values, as in PEFT. The largest entry of each column
    of B is positive, so that the signs do not depend on the library. Above EXACT_UP_TO features the
    factors are those of 16 subspace iterations (Halko et al., arXiv:0909.4061, algorithm 4.4), from
    a fixed start.
    """
    wide = weight_OD.float()
    if min(wide.shape) <= EXACT_UP_TO:
        u, s, v = torch.linalg.svd(wide, full_matrices=False)
    else:
        u, s, v = _subspace_svd(wide, rank)
    u, s, v = u[:, :rank], s[:rank].sqrt(), v[:rank]
    sign = torch.sign(u.gather(0, u.abs().argmax(0, keepdim=True)))
    return (s * sign[0])[:, None] * v, u * sign * s


def _subspace_svd(weight_OD: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    num_columns = min(rank + OVERSAMPLED, *weight_OD.shape)
    random = torch.randn(weight_OD.shape[1], num_columns, generator=torch.Generator().manual_seed(0))
    q = torch.linalg.qr(weight_OD @ random.to(weight_OD))[0]
    for _ in range(ITERATIONS):
        q = torch.linalg.qr(weight_OD @ torch.linalg.qr(weight_OD.t() @ q)[0])[0]
    u, s, v = torch.linalg.svd(q.t() @ weight_OD, full_matrices=False)
    return q @ u, s, v
