"""Trace a few optimizer steps (`train.profile_steps`) with torch's profiler.

The folder then holds trace.json.gz, for chrome://tracing or https://ui.perfetto.dev, and ops.txt,
the slowest ops. The trace includes an evaluation between two traced steps. Tracing slows the steps,
so their speed is not the trial's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from engine.config.trial import PROFILE_AFTER
from engine.system.files import write_folder

NUM_OPS = 40  # lines of ops.txt


@contextmanager
def traced(num_steps: int, folder: Path, device: torch.device) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step.

    After PROFILE_AFTER steps, the next `num_steps` are traced into `folder`, once. If the trial
    ends among them, the trace holds the steps so far. 0 traces nothing and costs nothing.
    """
    if num_steps == 0:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    steps = schedule(wait=PROFILE_AFTER - 1, warmup=1, active=num_steps, repeat=1)

    def write(profiler: profile) -> None:
        write_folder(folder, lambda target: _fill(target, profiler, device))

    with profile(activities=activities, schedule=steps, on_trace_ready=write, acc_events=True) as profiler:
        yield profiler.step


def _fill(folder: Path, profiler: profile, device: torch.device) -> None:
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    (folder / "ops.txt").write_text(profiler.key_averages().table(sort_by=order, row_limit=NUM_OPS) + "\n", encoding="utf-8")
