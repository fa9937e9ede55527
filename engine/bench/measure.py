"""Measure one system with one model in this process: median step, peak memory and losses."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.bench.rows import Setting
from engine.bench.shapes import SHAPES
from engine.bench.systems import SYSTEMS, Builder
from engine.data.packing import Batch, Sample, collate
from engine.model.device import free, pick_device
from engine.quant.bnb import adamw_8bit
from engine.units import GIB


def measure(system: str, settings: list[Setting], checkpoint: Path | None = None) -> Iterator[dict[str, Any]]:
    """Yield for each setting the median step after warm-up and the peak of allocated memory.

    A setting that runs out of memory gives {"error": reason}. All settings have one model, which is
    loaded once. checkpoint: its folder, for systems that load from one.
    """
    device, started = pick_device("auto"), time.perf_counter()
    builder = SYSTEMS[system].build(settings[0], device, checkpoint)
    loaded = time.perf_counter() - started
    for setting in settings:
        try:
            result = {**_measured(builder, setting, device), "load_s": loaded}
        except torch.OutOfMemoryError:
            result = {"error": "out of memory"}
        builder.undo()
        free(device)
        yield result


def _measured(builder: Builder, setting: Setting, device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction((setting.cap_gib or total) / total)
    torch.manual_seed(0)  # PEFT draws its A from the global generator
    step, parameters, after_step = builder.prepare(setting)
    optimizer = adamw_8bit(parameters, lr=2e-4)
    batches = [tokens(setting, number) for number in range(setting.warmup + setting.steps)]
    clock, losses = Clock(device), []
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
    median = sorted(seconds[setting.warmup :])[setting.steps // 2]
    return {
        "tokens_per_second": setting.batch * setting.length / median,
        "step_time_ms": 1000 * median,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0,
        "host_gib": builder.host_gib(),
        "first_step_s": seconds[0],
        "first_loss": losses[0].item(),
        "last_loss": losses[-1].item(),
    }


def tokens(setting: Setting, number: int) -> Batch:
    """Return the host batch of step `number`, the same for every system; all tokens are labels."""
    generator = torch.Generator().manual_seed(number)
    shape = (setting.batch, setting.length)
    ids = torch.randint(0, SHAPES[setting.model]["vocab_size"], shape, generator=generator).numpy()
    return collate([Sample(row, row >= 0) for row in ids])


class Clock:
    """Take times between marks, on CUDA by events.

    A training loop never waits for the device, so the benchmark does not either.
    """

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
        """Return the seconds from mark to mark."""
        if not self._cuda:
            return [b - a for a, b in itertools.pairwise(self._marks)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(self._marks)]
