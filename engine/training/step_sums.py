"""Sum loss, tokens and time of the steps between two reports, while the device computes."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from engine.training.checkpoint import Sums
from engine.training.divergence import check_step


class StepSums:
    """Add steps to `sums`. Device values are read one step late, so no step waits for the host."""

    def __init__(self, device: torch.device, vocab_size: int, sums: Sums) -> None:
        """Start from `sums`: empty, or the steps since the last report of a continued trial."""
        self.sums = sums
        self._device, self._vocab_size = device, vocab_size
        self._began_s = time.perf_counter() - sums.seconds
        self._is_open = True
        self._pending: tuple[Tensor, Tensor, int] | None = None

    @property
    def train_loss(self) -> float:
        """Return the mean loss per target token, in nats."""
        return self.sums.loss / self.sums.num_targets

    def add(self, loss: Tensor, grad_norm: Tensor, num_tokens: int, num_targets: int) -> None:
        """Add a step. loss (summed over targets) and grad_norm may still be on the device."""
        self._read()
        self._pending = (loss, grad_norm, num_targets)
        self.sums.num_tokens += num_tokens
        self.sums.num_targets += num_targets
        self.sums.num_steps += 1

    def settle(self) -> None:
        """Wait for the device and add the last step. Raises DivergedError if that step diverged."""
        self._read()
        if self._is_open:
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            self.sums.seconds = time.perf_counter() - self._began_s

    def close(self) -> None:
        """Settle the sums and stop the clock, after the last step."""
        self.settle()
        self._is_open = False

    def _read(self) -> None:
        if self._pending is None:
            return
        (loss, grad_norm), num_targets = (value.item() for value in self._pending[:2]), self._pending[2]
        self._pending = None
        check_step(loss / num_targets, grad_norm, self._vocab_size)
        self.sums.grad_norm = grad_norm
        self.sums.loss += loss
