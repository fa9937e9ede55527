"""Compare measured with predicted peak memory over many settings, in one process.

    python -m engine.bench.calibrate --out engine/bench/calibration/<card>-<date>.jsonl --budget-s 300
    python -m engine.bench.calibrate --plot FILE.png engine/bench/calibration/*.jsonl

It builds each model once. Each setting takes two steps, of which the first makes the optimizer's
states, and gives one line of JSON. Settings are drawn so that each dimension takes all its values
next to varied values of the others. It measures only our engine and needs a CUDA device.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from engine.adapter.flat import FlatAdapter
from engine.adapter.lora import attach, detach
from engine.bench.measure import tokens
from engine.bench.rows import Setting
from engine.bench.shapes import SHAPES, random_base
from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.memory.prediction import predict_memory
from engine.model.base import Base
from engine.model.device import free, pick_device, pick_dtype
from engine.quant.bnb import adamw_8bit
from engine.shape.model_shape import ModelShape
from engine.shape.policies import LADDER, Policy
from engine.system.provenance import provenance
from engine.units import GIB

TARGETS: dict[str, Any] = {
    "all-linear": "all-linear",
    "attention": r".*\.self_attn\.\w+_proj",
    "qv": r".*\.(q|v|qkv)_proj",
    "mlp": r".*\.mlp\.\w+_proj",
}
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
RANKS = (4, 8, 16, 32, 64, 128)
MICRO_BATCHES = (1, 2, 4, 8)
COLUMNS = ("model", "batch", "length", "rank", "targets", "policy", "keep_layers", "host_layers", "dropout")
# Limits of a micro-batch: longer ones of the larger models are slow, and the suite `long` has them.
MAX_TOKENS = {"smollm2-135m": 65536, "llama-3.2-1b": 65536, "llama-3.2-3b": 32768, "llama-3.1-8b": 16384}
OTHER_MAX_TOKENS = 16384


def main(arguments: list[str] | None = None) -> int:
    options = _arguments(arguments)
    if options.plot:
        plot([json.loads(line) for file in options.files for line in file.read_text().splitlines()], options.plot)
        return 0
    if not torch.cuda.is_available():
        raise SystemExit("engine.bench.calibrate: needs a CUDA device")
    deadline = time.monotonic() + options.budget_s
    with options.out.open("a") as file:
        for record in measure_all(options, deadline):
            file.write(json.dumps(record, sort_keys=True) + "\n")
            file.flush()
            error = record["predicted_gib"] / record["peak_allocated_gib"] - 1 if record["peak_allocated_gib"] else 0.0
            print(f"{_name(record):<70}{record['predicted_gib']:>8.2f}{record['peak_allocated_gib'] or 0:>8.2f}{error:>8.1%}")
    return 0


def measure_all(options: argparse.Namespace, deadline: float) -> Iterator[dict[str, Any]]:
    """Yield one record per setting; peak_allocated_gib is None if it ran out of memory."""
    device = pick_device("cuda")
    facts = {"card": torch.cuda.get_device_name(), **provenance(), **({"git.commit": options.commit} if options.commit else {})}
    for i, model in enumerate(options.models):
        base = random_base(model, device, pick_dtype("auto", device), fused=True)
        share = (deadline - time.monotonic()) / (len(options.models) - i)
        until = time.monotonic() + share
        for values in draw(model, options.seed, options.per_model):
            if time.monotonic() > until:
                break
            yield {**values, **facts, **measure_one(base, values)}
        del base
        free(device)


def draw(model: str, seed: int, count: int) -> list[dict[str, Any]]:
    """Return `count` settings: lengths in turn, each with shuffled values of other dimensions."""
    generator = random.Random(f"{seed}:{model}")
    columns = {
        "rank": RANKS, "targets": tuple(TARGETS), "policy": tuple(policy.value for policy in LADDER), "batch": MICRO_BATCHES,
        "keep_layers": (0, 1, 4), "host_layers": (0, 0, 8), "dropout": (0.0, 0.0, 0.1),
    }  # fmt: skip
    cycles = {name: itertools.cycle(generator.sample(values, len(values))) for name, values in columns.items()}
    settings, longest = [], MAX_TOKENS.get(model, OTHER_MAX_TOKENS)
    lengths = [length for length in LENGTHS if length <= longest]
    for length in itertools.islice(itertools.cycle(lengths), count):
        values = {name: next(cycle) for name, cycle in cycles.items()}
        if generator.random() < 0.3:  # otherwise cycles of equal length would move in step
            next(cycles[generator.choice(list(cycles))])
        values["batch"] = max(1, min(values["batch"], longest // length))
        settings.append({"model": model, "length": length, **values})
    return settings


def measure_one(base: Base, values: dict[str, Any]) -> dict[str, Any]:
    """Return the predicted and the measured peak of a step, in GiB."""
    config = train_config(values)
    predicted = predict_memory(config, ModelShape.of(base.model.config.to_dict(), values["model"]), evaluation=False).peak_gib
    layers = attach(base.model, base.linear_names, config.lora, 0)
    try:
        peak = _peak(base, FlatAdapter(layers, base.dtype), config, values)
    except torch.OutOfMemoryError:
        peak = None
    finally:
        detach(base.model, layers)
        base.checkpoint_activations(Policy.KEEP)
        layers.clear()
        free(base.device)
    return {"predicted_gib": predicted, "peak_allocated_gib": peak}


def train_config(values: dict[str, Any]) -> TrainConfig:
    """Return the TrainConfig of a drawn setting."""
    return parse(TrainConfig, {
        "model": {"path": values["model"]},
        "data": {"train": "random", "max_seq_length": values["length"]},
        "lora": {"rank": values["rank"], "target_modules": TARGETS[values["targets"]], "lora_dropout": values["dropout"]},
        "train": {
            "max_tokens": 10**6, "micro_batch_size": values["batch"], "gradient_accumulation_steps": 1,
            "activation_checkpointing": values["policy"], "keep_layers": values["keep_layers"],
            "host_layers": values["host_layers"], "weight_cache_gib": 0.0,
        },
    })  # fmt: skip


def _peak(base: Base, adapter: FlatAdapter, config: TrainConfig, values: dict[str, Any]) -> float:
    loop = config.train
    base.checkpoint_activations(Policy.of(loop.activation_checkpointing), loop.keep_layers, loop.host_layers)
    base.model.train()
    optimizer = adamw_8bit([adapter.parameter], lr=1e-4)
    setting = Setting(model=values["model"], batch=values["batch"], length=values["length"])
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()  # gradients are 0; this makes the states that every later step has
    batch = tokens(setting, 0).to(base.device)
    (base.loss(batch) / batch.num_targets).backward()
    torch.nn.utils.clip_grad_norm_(adapter.parameter, 1.0)
    optimizer.step()
    adapter.refresh()
    adapter.zero_grad()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / GIB


def plot(records: list[dict[str, Any]], target: Path) -> None:
    """Plot predicted against measured peaks: one point per setting, with the 5 % band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 6))
    measured = [r for r in records if r["peak_allocated_gib"]]
    for model in sorted({r["model"] for r in measured}):
        points = [(r["peak_allocated_gib"], r["predicted_gib"]) for r in measured if r["model"] == model]
        axes.scatter(*zip(*points, strict=True), s=14, label=f"{model} ({len(points)})")
    low, high = 0.8 * min(r["peak_allocated_gib"] for r in measured), 1.2 * max(r["peak_allocated_gib"] for r in measured)
    axes.plot([low, high], [low, high], color="black", linewidth=0.8)
    axes.fill_between([low, high], [0.95 * low, 0.95 * high], [1.05 * low, 1.05 * high], alpha=0.15, label="5 %")
    axes.set(xscale="log", yscale="log", xlabel="measured peak, GiB", ylabel="predicted peak, GiB", title=records[0]["card"])
    axes.legend()
    figure.savefig(target, dpi=120, bbox_inches="tight")


def _name(record: dict[str, Any]) -> str:
    return " ".join(str(record[k]) for k in COLUMNS)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="with --plot")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=list(MAX_TOKENS))
    parser.add_argument("--per-model", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget-s", type=float, default=300.0)
    parser.add_argument("--commit", help="commit to record if the code is not in a git checkout")
    options = parser.parse_args(arguments)
    if bool(options.plot) == bool(options.out):
        parser.error("give --out to measure, or --plot and files")
    return options


if __name__ == "__main__":
    sys.exit(main())
