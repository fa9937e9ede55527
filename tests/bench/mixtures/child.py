"""Measure one system on one mixture in this process: load, first step, steady steps, peaks and losses.

`python -m tests.bench.mixtures.child ROW FOLDER` is run by tests/bench/mixtures/__main__.py. ROW is a
row as JSON, and FOLDER what Unsloth reads. What is known is handed back part after part, so that a
process that runs out of time or memory leaves its first figures.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.bench.measure import Clock, tokens
from engine.bench.process import hand_back
from engine.bench.ragged_rows import shape_of
from engine.bench.rows import Setting
from engine.bench.shapes import SHAPES
from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.data.packing import Batch, Sample, collate
from engine.errors import EngineError, first_line
from engine.model.device import free, limit_memory, pick_device
from engine.planning.cards import Card, found_card
from engine.planning.planner import make_compute_plan
from engine.quant.bnb import adamw_8bit
from engine.system.provenance import package_tags, provenance
from engine.units import GIB
from tests.bench.mixtures.builders import BUILDERS, NEEDED, shape_with
from tests.bench.mixtures.job import OURS, MixtureRow

Part = dict[str, Any]
RATE, UNTIMED = 2e-4, 3
AMPLE_GIB = 60.0
"""What a prediction may fill: it says what is needed, not whether it fits."""


def main(arguments: list[str]) -> int:
    row, folder = MixtureRow.of(json.loads(arguments[0])), Path(arguments[1])
    for part in measure(row, folder):
        hand_back(part)
    return 0


def measure(row: MixtureRow, folder: Path | None) -> Iterator[Part]:
    """Yield the figures part after part. Raises torch.OutOfMemoryError under the cap, and what the library raises."""
    device, began_s = pick_device("auto"), time.perf_counter()
    for package in NEEDED[row.system]:  # before CUDA starts, and Unsloth before transformers
        importlib.import_module(package)
    imported_s = time.perf_counter() - began_s
    setting = replace(row.setting, model=shape_with(row.setting.model, row.layers))
    on_card = device.type == "cuda"
    if on_card and setting.cap_gib:
        limit_memory(setting.cap_gib, device)
    yield {**_facts(on_card), "import_s": imported_s}
    if row.system == OURS and on_card:
        card = found_card(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / GIB)
        yield predicted(setting, row.offloads, card)
    began_s = time.perf_counter()
    builder = BUILDERS[row.system](setting, device, folder)
    load_s = _wait(on_card) - began_s
    loaded = {"loaded_gib": torch.cuda.memory_allocated() / GIB} if on_card else {}
    yield {"load_s": load_s, **loaded, **_memory("load_peak_", on_card)}
    free(device)
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    yield from _steps(builder, setting, row, device)


def _steps(builder: Any, setting: Setting, row: MixtureRow, device: torch.device) -> Iterator[Part]:
    """Yield the number of trained values, then the first two steps, each waited for, then the steady ones."""
    on_card = device.type == "cuda"
    torch.manual_seed(0)  # PEFT draws its A from the global generator
    step, parameters, after_step = builder.prepare(setting)
    optimizer = adamw_8bit(parameters, lr=RATE)
    optimizer.place_states(row.offloads)
    yield {"trained_values": sum(parameter.numel() for parameter in parameters)}
    make, losses = ragged if row.is_ragged else tokens, []

    def one(number: int) -> None:
        losses.append(step(make(setting, number)))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        after_step()

    seconds = []
    for number in range(UNTIMED):
        began_s = time.perf_counter()
        one(number)
        seconds.append(_wait(on_card) - began_s)
    yield {"first_step_s": seconds[0], "second_step_s": seconds[1], **_memory("peak_", on_card)}
    clock, began_s = Clock(device), time.perf_counter()
    clock.mark()
    for number in range(UNTIMED, UNTIMED + setting.steps):
        one(number)
        clock.mark()
    host_s = (time.perf_counter() - began_s) / setting.steps
    steady = sorted(clock.intervals())
    median_s = steady[len(steady) // 2]
    yield {
        "tokens_per_second": setting.length / median_s, "step_time_ms": 1e3 * median_s, "fastest_ms": 1e3 * steady[0],
        "slowest_ms": 1e3 * steady[-1], "host_ms": 1e3 * host_s, **_memory("peak_", on_card),
        "first_loss": losses[0].item(), "last_loss": losses[-1].item(),
    }  # fmt: skip


def ragged(setting: Setting, number: int) -> Batch:
    """Return a row full of samples of log-normal lengths (median 270), of which the last is cut to fill the row."""
    random, samples, left = np.random.default_rng(number), [], setting.length
    while left:
        length = int(min(left, max(16, np.exp(random.normal(5.6, 0.9)))))
        samples.append(Sample(random.integers(0, SHAPES[setting.model]["vocab_size"], length), np.ones(length, bool)))
        left -= length
    return collate(samples)


def predicted(setting: Setting, offloads: bool, card: Card) -> Part:
    """Return what our planner says of this setting on the card; `unpredicted` holds the reason if it says nothing."""
    train = {
        "max_tokens": 10**6, "tokens_per_step": setting.length, "memory_budget_gib": AMPLE_GIB, "micro_batch_size": 1,
        "activation_checkpointing": setting.policy, "keep_layers": setting.keep_layers, "host_layers": 0,
        "weight_cache_gib": setting.weight_cache_gib, "cuda_graphs": setting.cuda_graphs, "offload_optimizer": offloads,
    }  # fmt: skip
    data = {"train": "random", "max_seq_length": setting.length, "eval_max_seq_length": setting.length}
    lora = {"rank": setting.rank, "target_modules": list(setting.targets), "lora_dropout": 0.0}
    try:
        sections = {"model": {"path": setting.model}, "data": data, "lora": lora, "optim": {"name": "adamw_8bit"}}
        plan = make_compute_plan(parse(TrainConfig, {**sections, "train": train}), shape_of(setting.model), card)
    except EngineError as error:
        return {"unpredicted": first_line(error)}
    return {
        "predicted_gib": plan.memory.peak_gib, "predicted_reserved_gib": plan.memory.reserved_gib,
        "predicted_tokens_per_second": plan.speed.tokens_per_second,
    }  # fmt: skip


def _wait(on_card: bool) -> float:
    """Return the time in seconds when the device has done everything."""
    if on_card:
        torch.cuda.synchronize()
    return time.perf_counter()


def _facts(on_card: bool) -> Part:
    card = torch.cuda.get_device_name() if on_card else "CPU"
    return {"card": card, "git.commit": "", **provenance(), **package_tags(("unsloth", "unsloth_zoo"))}


def _memory(name: str, on_card: bool) -> Part:
    """Return the peaks of allocated and of reserved memory until now."""
    if not on_card:
        return {}
    measured = {"allocated": torch.cuda.max_memory_allocated, "reserved": torch.cuda.max_memory_reserved}
    return {f"{name}{kind}_gib": read() / GIB for kind, read in measured.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
