"""One system in this process: the median step, the peak of memory and the losses."""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import torch
from torch import nn

from engine.bench.shapes import SHAPES
from engine.bench.systems import SYSTEMS
from engine.metrics import GIB
from engine.model import pick_device
from engine.packing import Batch, Sample, collate
from engine.quant import adamw_8bit


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Median step over `options.steps` steps after warm-up, and the peak of allocated memory. options: see systems.py."""
    device = pick_device("auto")
    if options.cap_gib and device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(options.cap_gib * GIB / torch.cuda.get_device_properties(0).total_memory)
    torch.manual_seed(0)  # PEFT draws its A from the global stream
    started = time.perf_counter()
    step, parameters, after_step = SYSTEMS[options.child].build(options, device)
    optimizer = adamw_8bit(parameters, lr=2e-4)
    loaded = time.perf_counter() - started
    batches = [tokens(options, number) for number in range(options.warmup + options.steps)]
    clock, losses = _Clock(device), []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock.mark()
    for batch in batches:
        losses.append(step(batch))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        after_step()
        clock.mark()
    seconds = clock.intervals()
    median = sorted(seconds[options.warmup :])[options.steps // 2]
    return {
        "tokens_per_second": options.batch * options.length / median,
        "step_time_ms": 1000 * median,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0,
        "first_step_s": seconds[0],
        "load_s": loaded,
        "first_loss": losses[0].item(),
        "last_loss": losses[-1].item(),
    }


def tokens(options: argparse.Namespace, number: int) -> Batch:
    """The batch of step `number`, on the host, the same for every system; every token is a label."""
    generator = torch.Generator().manual_seed(number)
    shape = (options.batch, options.length)
    ids = torch.randint(0, SHAPES[options.model]["vocab_size"], shape, generator=generator).numpy()
    return collate([Sample(row, row >= 0) for row in ids])


class _Clock:
    """Times between marks, by events on CUDA: a training loop never waits for the device, so neither does its benchmark."""

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._marks = device.type == "cuda", []

    def mark(self) -> None:
        if self._cuda:
            if not self._marks:
                torch.cuda.synchronize()
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Seconds from mark to mark."""
        if not self._cuda:
            return [b - a for a, b in itertools.pairwise(self._marks)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(self._marks)]
