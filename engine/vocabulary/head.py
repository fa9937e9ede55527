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
    own_rows: tuple[Tensor, Tensor] | None = None

    def logits(self, h_CD: Tensor) -> Tensor:
        """Return the products [C, V] with the table, before scale and softcap, in the dtype of h."""
        bias = None if self.bias_V is None else self.bias_V.to(h_CD.dtype)
        logits_CV = torch.nn.functional.linear(h_CD, self.weight_VD.to(h_CD.dtype), bias)
        if self.own_rows is not None:
            ids, rows_ND = self.own_rows
            own_CN = torch.nn.functional.linear(h_CD, rows_ND.to(h_CD.dtype), None if bias is None else bias[ids])
            logits_CV = logits_CV.index_copy(1, ids, own_CN) if torch.is_grad_enabled() else logits_CV.index_copy_(1, ids, own_CN)
        return logits_CV

    def input_gradient(self, dlogits_CV: Tensor, h_CD: Tensor, drows_ND: Tensor | None) -> Tensor:
        """Return dL/dh [C, D] of dL/dlogits, which may be overwritten. Add dL/drows to `drows_ND` in place, if it is given."""
        if self.own_rows is None:
            return dlogits_CV @ self.weight_VD.to(h_CD.dtype)
        ids, rows_ND = self.own_rows
        own_CN = dlogits_CV[:, ids]
        if drows_ND is not None:
            drows_ND += (own_CN.t() @ h_CD).float()
        dlogits_CV.index_fill_(1, ids, 0.0)
        return (dlogits_CV @ self.weight_VD.to(h_CD.dtype)).addmm_(own_CN, rows_ND.to(h_CD.dtype))
