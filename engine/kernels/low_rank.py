"""A low-rank (LoRA) term that an operation adds to an operand while it reads it.

Shape letters: T tokens, F features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """A term low @ b^T to be added: any strides, the scale already in b, the dtype of what it is added to."""

    low_TR: Tensor
    b_FR: Tensor
