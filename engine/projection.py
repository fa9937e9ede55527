"""One linear projection with or without an adapter, forward and backward by hand: the building block of a fused layer.

y = x W^T + b + scaling * (dropout(x) A^T) B^T. W is frozen: it is dequantised at each use and gets no gradient. The low-rank
part is added into y by one matmul (`addmm_`), so that it is rounded once, with the rest.

Shape letters: T tokens, D input features, O output features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.lora import LoraLinear
from engine.quant import FrozenLinear


@dataclass
class Projection:
    """A layer taken apart for one call. a_RD and b_OR are None where the layer has no adapter, and in the activations' dtype.

    seed: of the dropout mask, drawn once per call, so that recomputation and backward see the mask of the forward pass."""

    base: FrozenLinear
    a_RD: Tensor | None
    b_OR: Tensor | None
    scaling: float
    dropout: float
    seed: int
    _low: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, layer: nn.Module, dtype: torch.dtype) -> Projection:
        """Take apart a FrozenLinear or a LoraLinear."""
        if isinstance(layer, FrozenLinear):
            return cls(layer, None, None, 0.0, 0.0, 0)
        if not isinstance(layer, LoraLinear):
            raise TypeError(f"a fused layer projects through FrozenLinear or LoraLinear, not {type(layer).__name__}")
        dropout = layer.dropout if layer.training else 0.0
        seed = int(torch.randint(2**62, ())) if dropout else 0  # the CPU generator: no device is waited for
        return cls(layer.base, *layer.cast(dtype), layer.scaling, dropout, seed)

    def forward(self, x_TD: Tensor) -> Tensor:
        """y [T, O], a fresh tensor."""
        bias = None if self.base.bias is None else self.base.bias.to(x_TD.dtype)
        y_TO = F.linear(x_TD, self.base.dequantized(x_TD.dtype), bias)
        if self.a_RD is not None:
            y_TO.addmm_(self._dropped(x_TD) @ self.a_RD.t(), self.b_OR.t(), alpha=self.scaling)
        return y_TO

    def input_gradient(self, dy_TO: Tensor, dx_TD: Tensor | None = None) -> Tensor:
        """dL/dx [T, D], added into `dx_TD` where given."""
        weight = self.base.dequantized(dy_TO.dtype)
        dx_TD = dy_TO @ weight if dx_TD is None else dx_TD.addmm_(dy_TO, weight)
        if self.a_RD is None:
            return dx_TD
        dlow_TR = self._low_gradient(dy_TO)
        if self.dropout:
            return dx_TD.add_((dlow_TR @ self.a_RD).mul_(self._mask(dx_TD)))
        return dx_TD.addmm_(dlow_TR, self.a_RD)

    def adapter_gradients(self, dy_TO: Tensor, x_TD: Tensor) -> tuple[Tensor, ...]:
        """(dA, dB), or nothing where there is no adapter."""
        if self.a_RD is None:
            return ()
        dropped_TD = self._dropped(x_TD)
        low_TR = dropped_TD @ self.a_RD.t()
        return self._low_gradient(dy_TO).t() @ dropped_TD, (dy_TO.t() @ low_TR) * self.scaling

    def _low_gradient(self, dy_TO: Tensor) -> Tensor:
        """dL/d(low-rank hidden) [T, R]; needed twice, computed once per gradient."""
        if self._low is None or self._low[0] is not dy_TO:
            self._low = (dy_TO, (dy_TO @ self.b_OR) * self.scaling)
        return self._low[1]

    def _dropped(self, x_TD: Tensor) -> Tensor:
        return x_TD * self._mask(x_TD) if self.dropout else x_TD

    def _mask(self, x_TD: Tensor) -> Tensor:
        """0 with probability `dropout`, else 1 / (1 - dropout)."""
        generator = torch.Generator(x_TD.device).manual_seed(self.seed)
        keep = torch.empty_like(x_TD).bernoulli_(1.0 - self.dropout, generator=generator)
        return keep.div_(1.0 - self.dropout)
