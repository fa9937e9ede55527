"""Define the output head: a frozen table, and what the model applies to its logits.

Shape letters: C rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """The frozen output embedding, and what the model applies to its logits.

    The logits are multiplied by `scale`; then they become softcap * tanh(logits / softcap).
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, h_CD: Tensor) -> Tensor:
        """Return the products [C, V] with the table, before scale and softcap, in the dtype of h."""
        bias = None if self.bias_V is None else self.bias_V.to(h_CD.dtype)
        return torch.nn.functional.linear(h_CD, self.weight_VD.to(h_CD.dtype), bias)
