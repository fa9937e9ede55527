"""Compare predicted with reserved memory on packed rows of unequal samples, setting by setting.

    python -m engine.bench.ragged_rows --out engine/bench/calibration/<card>-<date>-ragged.jsonl --budget-s 300
    python -m engine.bench.ragged_rows --summary engine/bench/calibration/*-ragged.jsonl

Each setting gets the plan that a trial would get, then the steps, the ladder left out, and one
evaluation, under a cap on what torch may reserve. A step that runs out of memory is a false fit.
Settings that the file already holds are not measured again, so the work can be done in pieces. It
measures only our engine and needs a CUDA device.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.adapter.lora import AnyLora, attach, detach
from engine.bench.drawn_rows.drawn_samples import SampleView
from engine.bench.shapes import family_kind, random_base, random_config
from engine.config.parsing import parse
from engine.config.trial import ModelConfig, TrainConfig
from engine.data.packing import Cursor, Sample
from engine.errors import OutOfMemory, first_line
from engine.evaluation.eval_loss import evaluation_batches
from engine.memory.prediction import CONTEXT_GIB
from engine.model.base import Base
from engine.model.device import free, limit_memory, pick_device, pick_dtype
from engine.model.library_layers import with_library_bytes
from engine.planning.cards import found_card
from engine.planning.compute_plan import ComputePlan
from engine.planning.planner import make_compute_plan
from engine.quant.bnb import adamw_8bit
from engine.shape.families import FAMILIES
from engine.shape.layer_plan import can_record
from engine.shape.model_shape import ModelShape
from engine.shape.policies import Policy
from engine.system.provenance import provenance
from engine.training.passes import Passes
from engine.training.recordings import Recordings
from engine.units import GIB

LENGTHS, RANKS, BUDGETS_GIB = (512, 1024, 2048, 4096, 8192), (8, 64), (23.5, 11.5, 23.5, 7.5)
KINDS: dict[str, dict[str, Any]] = {
    "plan": {}, "graphs": {"cuda_graphs": True, "host_layers": 0}, "dropout": {"lora_dropout": 0.1},
    "eager": {"cuda_graphs": False}, "host": {"activation_checkpointing": True, "host_layers": 8},
}  # fmt: skip
# The first take the least time. The last three run transformers' own layers.
MODELS = (
    "smollm2-135m", "ernie-4.5-0.3b", "qwen2.5-0.5b", "qwen3-0.6b", "gemma-3-1b", "exaone-4-1.2b", "olmo-2-1b", "llama-3.2-1b",
    "glm-edge-1.5b", "hunyuan-1.8b", "helium-2b", "gemma-2b", "gemma-2-2b", "gemma-4-e2b", "granite-3.3-2b", "smollm3-3b",
    "llama-3.2-3b", "ministral-3-3b", "phi-4-mini", "qwen3-4b", "mistral-7b", "qwen2.5-7b", "olmo-3-7b", "ministral-8b",
    "llama-3.1-8b", "glm-4-9b", "olmo-1b", "starcoder2-3b", "aya-expanse-8b",
)  # fmt: skip
KEY = ("model", "kind", "length", "rank", "budget_gib")
SAMPLES, EVALUATED, STEPS, TOKENS_PER_STEP, LONGEST_EVERY = 400, 40, 3, 16384, 16


def main(arguments: list[str] | None = None) -> int:
    options = _arguments(arguments)
    if options.summary:
        print(summary(_read(*options.summary)))
        return 0
    if not torch.cuda.is_available():
        raise SystemExit("engine.bench.ragged_rows: needs a CUDA device")
    done = _read(*options.done, *filter(Path.is_file, [options.out]))
    with options.out.open("a") as file:
        for record in measure_all(options, {_key(record) for record in done}, time.monotonic() + options.budget_s):
            file.write(json.dumps(record, sort_keys=True) + "\n")
            file.flush()
            print(_line(record), flush=True)
            done.append(record)
    print(summary(done))
    return 0


def measure_all(options: argparse.Namespace, done: set[tuple[Any, ...]], deadline: float) -> Iterator[dict[str, Any]]:
    """Yield one record per setting that is not done, until the time is over."""
    device = pick_device("cuda")
    facts = {"card": torch.cuda.get_device_name(), **provenance(), **({"git.commit": options.commit} if options.commit else {})}
    for model in options.models:
        settings = [values for values in draw(model, options.per_model) if _key(values) not in done]
        if not settings or time.monotonic() > deadline:
            continue
        started, fused = time.monotonic(), family_kind(model) in FAMILIES
        base = random_base(model, device, pick_dtype("auto", device), fused)
        facts["load_s"] = round(time.monotonic() - started, 2)
        for values in settings:
            if time.monotonic() > deadline:
                break
            started = time.monotonic()
            record = measure_one(base, values)
            yield {**values, **facts, **record, "seconds": round(time.monotonic() - started, 2)}
        base = None  # the next model needs its memory
        free(device)


def draw(model: str, count: int) -> list[dict[str, Any]]:
    """Return `count` different settings: each value of a dimension next to varied ones of the others."""
    generator, shape = random.Random(model), shape_of(model)
    kinds = [kind for kind in KINDS if shape.family != "other" or kind not in ("graphs", "host")]
    everything = list(itertools.product(kinds, LENGTHS, RANKS))
    generator.shuffle(everything)
    chosen: list[dict[str, Any]] = []
    seen: dict[tuple[int, Any], int] = {}
    while everything and len(chosen) < count:
        best = min(everything, key=lambda values: sum(seen.get(place, 0) for place in enumerate(values)))
        everything.remove(best)
        for place in enumerate(best):
            seen[place] = seen.get(place, 0) + 1
        kind, length, rank = best
        budget = BUDGETS_GIB[len(chosen) % len(BUDGETS_GIB)]
        values = {"model": model, "kind": kind, "length": length, "rank": rank, "budget_gib": budget}
        if kind == "graphs" and not can_record(train_config(values), shape):
            continue
        chosen.append(values)
    return chosen


def train_config(values: dict[str, Any]) -> TrainConfig:
    """Return the TrainConfig of a setting, with all that its kind leaves open `auto`."""
    changes = dict(KINDS[values["kind"]])
    lora = {"rank": values["rank"], "lora_dropout": changes.pop("lora_dropout", 0.0)}
    train = {"max_tokens": 10**6, "tokens_per_step": TOKENS_PER_STEP, "memory_budget_gib": values["budget_gib"], **changes}
    data = {"train": "random", "max_seq_length": values["length"], "eval_max_seq_length": values["length"]}
    return parse(TrainConfig, {"model": {"path": values["model"]}, "data": data, "lora": lora, "train": train})


def measure_one(base: Base, values: dict[str, Any]) -> dict[str, Any]:
    """Return prediction and measurement of a setting. `fits` is False if no plan was predicted to fit."""
    config, shape = train_config(values), shape_of(values["model"])
    card = found_card(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / GIB)
    try:
        plan = make_compute_plan(config, shape, card)
    except OutOfMemory as error:
        return {"fits": False, "predicted_gib": error.predicted_gib}
    predicted = {"predicted_gib": plan.memory.peak_gib, "predicted_reserved_gib": plan.memory.reserved_gib}
    predicted |= {"predicted_tokens_per_second": round(plan.speed.tokens_per_second)}
    chosen = {"plan": plan.describe(), "settings": plan.settings()}
    layers = attach(base.model, base.linear_names, config.lora, 0)
    free(base.device)
    limit_memory(values["budget_gib"] - CONTEXT_GIB, base.device)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_accumulated_memory_stats()
    try:
        measured = {"tokens_per_second": round(_steps(base, layers, config, plan, shape.vocab_size))}
    except torch.OutOfMemoryError:
        measured = {"tokens_per_second": None}
    stats = torch.cuda.memory_stats()
    measured |= {
        **{f"peak_{name}_gib": stats[f"{name}_bytes.all.peak"] / GIB for name in ("allocated", "reserved")},
        "num_out_of_memory": stats["num_ooms"], "num_retries": stats["num_alloc_retries"],
    }  # fmt: skip
    Recordings.of(base).clear()
    detach(base.model, layers)
    layers.clear()
    base.checkpoint_activations(Policy.KEEP)
    base.cache_weights(0.0)
    limit_memory(math.inf, base.device)
    return {"fits": True, **predicted, **chosen, **measured}


def _steps(base: Base, layers: dict[str, AnyLora], config: TrainConfig, plan: ComputePlan, vocab_size: int) -> float:
    """Take the steps and evaluate, as a trial does; return the tokens per second of the last step."""
    view = RandomView(config.data.max_seq_length, vocab_size)
    cursor = Cursor(view.lengths, config.data.max_seq_length, True, 0)
    evaluated = evaluation_batches(base, view.first(EVALUATED), config.data.max_seq_length)
    passes = Passes(config, base, layers, view, evaluated, cursor)
    passes.follow(plan, config.train.memory_budget_gib)
    base.model.train()
    adapter = passes.adapter
    optimizer = adamw_8bit([adapter.parameter], lr=1e-4)
    passes.record()
    for step in range(STEPS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        num_tokens = passes.gradients(cursor.take(config.bins_per_step), step).num_tokens
        nn.utils.clip_grad_norm_(adapter.parameter, 1.0)
        optimizer.step()
        adapter.refresh()
        adapter.zero_grad()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        if step == 0:
            passes.evaluate(lambda: None)
    return num_tokens / seconds


class RandomView(SampleView):
    """Samples of the lengths of chats, log-normal around 270 tokens.

    Some are as long as allowed. The targets of each are its last 40 to 90 %.
    """

    def __init__(self, longest: int, vocab_size: int) -> None:
        random_ = np.random.default_rng(0)
        lengths = np.clip(np.exp(random_.normal(5.6, 0.9, SAMPLES)), 16, longest).astype(np.int64)
        lengths[::LONGEST_EVERY] = longest
        starts = random_.uniform(0.1, 0.6, SAMPLES) * lengths
        ids = [random_.integers(0, vocab_size, n) for n in lengths]
        super().__init__(lengths, [Sample(own, np.arange(len(own)) >= start) for own, start in zip(ids, starts)])


def summary(records: list[dict[str, Any]]) -> str:
    """Return a short text: false fits, and errors of the predicted reserved memory."""
    tried = [record for record in records if record["fits"]]
    false_fits = [record for record in tried if record["num_out_of_memory"]]
    lines = [f"{len(tried)} settings, {len({record['model'] for record in tried})} models: {len(false_fits)} false fits"]
    whole = [record for record in tried if not record["num_out_of_memory"]]
    for name in ("allocated", "reserved"):
        predicted = "predicted_gib" if name == "allocated" else "predicted_reserved_gib"
        errors = sorted(record[predicted] / record[f"peak_{name}_gib"] - 1.0 for record in whole)
        if errors:
            sizes = sorted(map(abs, errors))
            p95 = sizes[min(len(sizes) - 1, math.ceil(0.95 * len(sizes)) - 1)]
            middle = errors[len(errors) // 2]
            lines.append(f"{name}: |error| p95 {p95:.1%}, from {errors[0]:.1%} to {errors[-1]:+.1%}, median {middle:+.1%}")
    return "\n".join([*lines, *map(_line, false_fits)])


def _line(record: dict[str, Any]) -> str:
    name = " ".join(str(record[key]) for key in KEY)
    if not record["fits"]:
        return f"{name:<44} fits no way: {record['predicted_gib']:.2f}"
    pairs = [("predicted_gib", "peak_allocated_gib"), ("predicted_reserved_gib", "peak_reserved_gib")]
    peaks = " ".join(f"{record[a]:6.2f}/{record[b]:5.2f} ({record[a] / record[b] - 1.0:+.1%})" for a, b in pairs)
    speed = f"{record['predicted_tokens_per_second']}/{record['tokens_per_second']} tok/s"
    trouble = f"{record['num_out_of_memory']} ooms {record['num_retries']} retries"
    return f"{name:<44} {peaks} {trouble}, {speed}, {record['plan']}"


def _read(*files: Path) -> list[dict[str, Any]]:
    try:
        found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        [*map(_key, found)]
    except (OSError, ValueError, LookupError, TypeError) as error:
        text = f"engine.bench.ragged_rows: {' '.join(map(str, files))} must hold records of this command: {first_line(error)}"
        raise SystemExit(text) from None
    return found


@functools.cache
def shape_of(model: str) -> ModelShape:
    found = random_config(model)
    shape = ModelShape.of(found.to_dict(), model)
    return with_library_bytes(shape, ModelConfig(path=model), found, _unmade)


def _unmade(config: Any, attention_name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, attn_implementation=attention_name)


def _key(values: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(values[name] for name in KEY)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to add records to")
    parser.add_argument("--done", type=Path, nargs="*", default=[], help="files whose settings are not measured again")
    parser.add_argument("--summary", type=Path, nargs="+", help="files to sum up")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--per-model", type=int, default=6)
    parser.add_argument("--budget-s", type=float, default=300.0)
    parser.add_argument("--commit", help="commit to record if the code is not in a git checkout")
    options = parser.parse_args(arguments)
    if bool(options.summary) == bool(options.out):
        parser.error("give --out to measure, or --summary and files")
    return options


if __name__ == "__main__":
    sys.exit(main())
