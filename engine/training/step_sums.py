"""Sum loss, tokens and time of the steps between two reports, while the device computes."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.training.checkpoint import Sums
from engine.training.divergence import check_step
from engine.trial_report import RECORDING, TRAIN, PartClock


class StepSums:
    """Add steps to `sums`. Device values are read one step late, so no step waits for the host."""

    def __init__(self, device: torch.device, vocab_size: int, sums: Sums, parts: PartClock) -> None:
        """Start from `sums`: empty, or the steps since the last report of a continued trial.

        parts: the trial's clock, whose steps are TRAIN, and RECORDING where graphs were recorded.
        """
        self.sums, self._parts = sums, parts
        self._device, self._vocab_size = device, vocab_size
        self._start_s = parts.seconds(TRAIN, RECORDING) - sums.seconds
        self._start_recording_s = parts.seconds(RECORDING) - sums.recording_s
        self._train_start_s = self._last_s = parts.seconds(TRAIN)
        self._num_tokens = self._num_first_tokens = 0
        self._first_s = 0.0
        self._is_open = True
        self._pending: tuple[Tensor, Tensor, int] | None = None

    @property
    def train_loss(self) -> float:
        """Return the mean loss per target token, in nats."""
        return self.sums.loss / self.sums.num_targets

    @property
    def recorded_since_s(self) -> float:
        """Return the seconds of recordings after the last step: those of the evaluation."""
        return self._parts.seconds(RECORDING) - self._start_recording_s - self.sums.recording_s

    def add(self, loss: Tensor, grad_norm: Tensor, num_tokens: int, num_targets: int, is_first: bool = False) -> None:
        """Add a step. loss (summed over targets) and grad_norm may still be on the device.

        is_first: the step is the first one of a plan in this process, so kernels may have been
        compiled in it. It alone is waited for.
        """
        self._read()
        self._pending = (loss, grad_norm, num_targets)
        self.sums.num_tokens += num_tokens
        self.sums.num_targets += num_targets
        self.sums.num_steps += 1
        self._num_tokens += num_tokens
        if is_first:
            self.settle()
            self._first_s += self._parts.seconds(TRAIN) - self._last_s
            self._num_first_tokens += num_tokens
        self._last_s = self._parts.seconds(TRAIN)

    def settle(self) -> None:
        """Wait for the device and add the last step. Raises DivergedError if that step diverged."""
        self._read()
        if self._is_open:
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            self._read_clock()

    def close(self) -> None:
        """Settle the sums and stop the clock, after the last step.

        What the first steps took beyond the others, per token, was no steady training. A first step
        without others to compare it with counts as a whole.
        """
        self.settle()
        rest_s = self._parts.seconds(TRAIN) - self._train_start_s - self._first_s
        rest_tokens = self._num_tokens - self._num_first_tokens
        steady_s = self._num_first_tokens * rest_s / rest_tokens if rest_tokens else 0.0
        self._parts.move(TRAIN, RECORDING, max(self._first_s - steady_s, 0.0))
        self._read_clock()
        self._is_open = False

    def _read_clock(self) -> None:
        self.sums.seconds = self._parts.seconds(TRAIN, RECORDING) - self._start_s
        self.sums.recording_s = self._parts.seconds(RECORDING) - self._start_recording_s

    def _read(self) -> None:
        if self._pending is None:
            return
        (loss, grad_norm), num_targets = (value.item() for value in self._pending[:2]), self._pending[2]
        self._pending = None
        check_step(loss / num_targets, grad_norm, self._vocab_size)
        self.sums.grad_norm = grad_norm
        self.sums.loss += loss
