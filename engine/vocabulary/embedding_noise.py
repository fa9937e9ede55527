"""Add noise to the input embeddings in training: NEFTune (Jain et al., arXiv:2310.05914).

Each element gets a number that is uniform within alpha / sqrt(L * D), for a sample of L tokens and
an embedding of D features. Packed samples have the bound of their own length. The noise is a hash of
the pass's seed and the element's place, as dropout's masks are: a resumed trial has it again, and a
recorded pass reads seed and alpha from the device.

Shape letters: T tokens of a row, N samples of a row, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from engine.kernels import ops

STREAM = 2**31 - 1  # no layer's mask has it


class EmbeddingNoise:
    """Add noise to what `embedding` returns while it trains, until `remove` is called.

    alpha: fp32 [] on the device. noise: int64 [2], whose first is the seed (`ops.dropout`). The owner
    sets `offsets_N`, where the row's samples begin [N + 1], before each pass.
    """

    def __init__(self, embedding: nn.Module, alpha: Tensor, noise: Tensor) -> None:
        self._alpha, self._noise = alpha, noise
        self.offsets_N: Tensor | None = None
        self._hook = embedding.register_forward_hook(self._add)

    def remove(self) -> None:
        self._hook.remove()

    def _add(self, embedding: nn.Module, given: Any, found: Tensor) -> Tensor:
        if not embedding.training or self.offsets_N is None:
            return found
        found = found.contiguous()  # the gradient of trained tokens' rows goes through it
        x_TD = found.detach().view(-1, found.shape[-1])
        ops.add_noise_(x_TD, bounds(self.offsets_N, *x_TD.shape, self._alpha), self._noise, STREAM)
        return found


@torch.no_grad()
def bounds(offsets_N: Tensor, num_tokens: int, width: int, alpha: Tensor) -> Tensor:
    """Return alpha / sqrt(L * D) of each token's sample, fp32 [T], without waiting for the device."""
    positions_T = torch.arange(num_tokens, device=offsets_N.device)
    sample_T = torch.bucketize(positions_T, offsets_N[1:-1], right=True)
    lengths_T = offsets_N.diff()[sample_T].clamp(min=1)
    return alpha * torch.rsqrt(lengths_T.float() * width)
