"""Define the low-rank (LoRA) term that an operation adds to an operand while it reads it.

Shape letters: T tokens, F features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """Hold the term low @ b^T, with the scale already in b.

    Both tensors have the dtype of the operand they are added to, and any strides.
    """

    low_TR: Tensor
    b_FR: Tensor
