"""Time whole steps of shallow models: few layers at the widths of a small, a middle and a large one.

The sum of a step's kernels is less than the step. What is left over (small kernels, gaps, clocks
under load) becomes the factor `gaps`, so that the prediction of these steps is right. The depth
adds nothing new, so a few layers tell what the whole model would.

The host's time for a layer is the difference between two depths, at so few tokens that the device
waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from engine.adapter.flat import FlatAdapter
from engine.adapter.lora import attach, detach
from engine.bench.shapes import random_base
from engine.config.trial import LoraConfig
from engine.data.packing import Batch, Sample, collate
from engine.model.base import Base
from engine.rates.timing import Timer
from engine.rates.widths import Widths
from engine.shape.policies import Policy
from engine.training import recordings

NUM_LAYERS, RANK = 3, 16
# A sample's tokens: no multiple of 256, so that attention runs as it does on ragged rows.
SAMPLE = 1000
HOST_DEPTHS, HOST_TOKENS = (2, 6), 64


@dataclass(frozen=True)
class WholeStep:
    """A step that is measured: forward and backward of one micro-batch, without the optimizer."""

    widths: Widths
    policy: Policy
    num_samples: int

    @property
    def name(self) -> str:
        return f"{self.widths.name} {self.policy.value} {self.num_samples}x{SAMPLE}"


def whole_steps(widths: Widths) -> list[WholeStep]:
    """Return the steps at these widths: all activations kept, and all recomputed."""
    number = max(1, widths.tokens // SAMPLE)
    return [WholeStep(widths, policy, number) for policy in (Policy.KEEP, Policy.RECOMPUTE)]


@contextmanager
def shallow_base(
    model: str, num_layers: int, device: torch.device, dtype: torch.dtype, fused: bool = True
) -> Iterator[tuple[Base, FlatAdapter]]:
    """Lend a random model of few layers with an adapter on all its linear layers."""
    base = random_base(model, device, dtype, fused, num_layers)
    layers = attach(base.model, base.linear_names, LoraConfig(rank=RANK), 0)
    try:
        base.model.train()
        yield base, FlatAdapter(layers, base.dtype)
    finally:
        detach(base.model, layers)


def step_seconds(timer: Timer, base: Base, adapter: FlatAdapter, policy: Policy, lengths: list[int]) -> float:
    """Return the device's seconds of a step over samples of these lengths.

    The launches are recorded where they can be, so that a slow host does not count.
    """
    base.checkpoint_activations(policy)
    seconds = timer(_recorded(_plainly(base, random_row(base, lengths)), base.device))
    adapter.zero_grad()
    base.checkpoint_activations(Policy.KEEP)
    return seconds


def host_ms(timer: Timer, model: str, device: torch.device, dtype: torch.dtype, fused: bool) -> float:
    """Return the host's milliseconds for one layer, forward and backward, without recorded launches.

    `timer` must be the host's.
    """
    seconds = []
    for depth in HOST_DEPTHS:
        with shallow_base(model, depth, device, dtype, fused) as (base, adapter):
            seconds.append(timer(_plainly(base, random_row(base, [HOST_TOKENS]))))
            adapter.zero_grad()
    return 1e3 * max(1e-6, (seconds[1] - seconds[0]) / (HOST_DEPTHS[1] - HOST_DEPTHS[0]))


def random_row(base: Base, lengths: list[int]) -> Batch:
    """Return a host batch of random tokens, all of them targets."""
    generator, vocabulary = np.random.default_rng(0), base.model.config.get_text_config().vocab_size
    rows = [generator.integers(0, vocabulary, length) for length in lengths]
    return collate([Sample(row, row >= 0) for row in rows])


def _plainly(base: Base, batch: Batch) -> Callable[[], object]:
    on_device = batch.to(base.device)

    def compute() -> None:
        (base.loss(on_device) / on_device.num_targets).backward()

    return compute


def _recorded(compute: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return the replay of the call's launches; the call itself where they cannot be recorded."""
    if device.type != "cuda":
        return compute
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is computed first may wait for the device
        compute()
    torch.cuda.current_stream().wait_stream(side)
    try:
        _, replay = recordings.capture(compute, torch.cuda.graph_pool_handle())
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # attention without a device-side list of samples, in older versions of torch
        return compute
    return replay
