"""Keep a running average of the flat adapter beside it, and exchange the two in place.

The average after T tokens weights the adapter after t tokens by t^(1/h - 1), with h the horizon. Its
mean age is h / (1 + h) of T at every T, so one setting serves every budget and every rung. A step
of n tokens that ends at T changes it by

    average += (1 - (1 - n / T)^(1/h)) * (adapter - average).

The first step sets it, so the untrained adapter is not in it. h = 1 is the plain mean over tokens.
This is the polynomial-decay averaging of Shamir and Zhang (arXiv:1212.1824), and the power-function
EMA of Karras et al. (arXiv:2312.02696) with h = 1 / (gamma + 1), in tokens instead of steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.adapter.flat import FlatAdapter

# Elements exchanged at once, through one temporary copy: 16 MiB.
EXCHANGED = 2**22


class RunningAverage:
    """Hold the average of an adapter's fp32 parameter, or nothing if there is no horizon.

    values: fp32 of the parameter's shape, None without a horizon. While the average is in the
    adapter's place, `values` holds the adapter of the last step.
    """

    def __init__(self, adapter: FlatAdapter, horizon: float | None) -> None:
        """horizon: see the module, in (0, 1]."""
        self._adapter, self._horizon, self._is_in_place = adapter, horizon, False
        self.values: Tensor | None = None if horizon is None else torch.zeros_like(adapter.parameter.detach())

    def update(self, num_tokens: int, tokens_seen: int) -> None:
        """Take in the adapter after a step of `num_tokens`, the last of `tokens_seen`. One launch, and no wait."""
        if self.values is not None:
            self.values.lerp_(self._adapter.parameter.detach(), step_weight(num_tokens, tokens_seen, self._horizon))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the average in the adapter's memory inside this context. There must be one.

        Addresses stay, so recorded passes read what is there.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for one, other in zip(self._adapter.parameter.detach().split(EXCHANGED), self.values.split(EXCHANGED)):
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)
        self._is_in_place = not self._is_in_place
        self._adapter.refresh()


def step_weight(num_tokens: int, tokens_seen: int, horizon: float) -> float:
    """Return the weight of the newest adapter, in (0, 1]; 1 at the first step."""
    before = tokens_seen - num_tokens
    return 1.0 if before <= 0 else -math.expm1(math.log(before / tokens_seen) / horizon)
