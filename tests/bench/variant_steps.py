"""Time a whole training step of each variant of LoRA and of the optimizer next to plain LoRA.

    python -m tests.bench.variant_steps --model llama-3.1-8b --batch 2 --length 2048 --json FILE
    python -m tests.bench.variant_steps --model tiny --batch 2 --length 32 --steps 2 --json FILE    # the path, on a CPU

All kinds take their turns around one resident base with random NF4 weights. Each has rank 16 on all
linear layers, recomputed activations but for the last layer, one row that repeats, and on a card
recorded passes. Plain LoRA comes again at the end, which shows how far the card drifts.

First the parts of a step are timed, and the host waits for the card between them. Then whole steps
follow each other as in a trial, and give `step_ms`. Adapters have the shape that their start needs,
not its values: no time depends on them. `paged` is the paged AdamW of bitsandbytes, which we do not
offer. A kind that runs out of memory, or that the model refuses, is a row with that reason.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.adapter.flat import FlatAdapter
from engine.adapter.lora import AnyLora, attach, detach
from engine.bench.shapes import SHAPES, random_base
from engine.config.trial import LoraConfig, OptimConfig
from engine.data.packing import Batch, Sample, collate
from engine.errors import EngineError, first_line
from engine.model.base import Base
from engine.model.device import free, pick_device, pick_dtype
from engine.shape.policies import Policy
from engine.system.command_line import run
from engine.system.provenance import provenance
from engine.training.cuda_graphs import make_graphs
from engine.training.optim import make_optimizer, set_learning_rate
from engine.training.recordings import Recordings
from engine.units import GIB

Record = dict[str, Any]
RANK, RATE, WARMUP = 16, 1e-5, 3
ABOUT_AS_LARGE = {"q_proj": 32, "k_proj": 32, "v_proj": 32, "o_proj": 32, "down_proj": 4, "gate_proj": 8, "up_proj": 8}
"""Ranks of an adapter of about as many values as rank 16 everywhere (Llama)."""


@dataclass(frozen=True)
class Kind:
    """Say how a kind differs from plain LoRA. lora, optim: fields of these sections. noise: NEFTune's alpha."""

    lora: Record = field(default_factory=dict)
    optim: Record = field(default_factory=dict)
    noise: float = 0.0
    is_paged: bool = False


PLAIN = "plain"
KINDS: dict[str, Kind] = {
    PLAIN: Kind(),
    "lion": Kind(optim={"name": "lion_8bit"}),
    "loraplus": Kind(optim={"loraplus_lr_ratio": 4.0}),
    "muon": Kind(optim={"name": "muon"}),
    "paged": Kind(is_paged=True),
    "neftune": Kind(noise=5.0),
    "rank_pattern": Kind({"rank_pattern": ABOUT_AS_LARGE}),
    "loftq": Kind({"start": "loftq"}),
    "pissa": Kind({"start": "pissa"}),
    "dropout": Kind({"lora_dropout": 0.05}),
    "dora": Kind({"use_dora": True}),
    "dora_dropout": Kind({"use_dora": True, "lora_dropout": 0.05}),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(lambda: _main(_arguments(arguments)), stopped="stopped; the --json file has the finished kinds")


def _main(options: argparse.Namespace) -> int:
    device = pick_device("auto")
    facts = {"card": torch.cuda.get_device_name() if device.type == "cuda" else "CPU", "git.commit": "", **provenance()}
    facts |= {"git.commit": options.commit} if options.commit else {}
    facts |= {name: getattr(options, name) for name in ("model", "batch", "length", "steps")}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    print(f"{options.model}, {options.batch} x {options.length} tokens, r {RANK}, {facts['card']}\n{HEADINGS}", flush=True)
    base, plain_ms = random_base(options.model, device, pick_dtype("auto", device), True), None
    row = make_row(options.batch, options.length, SHAPES[options.model]["vocab_size"])
    for name in options.kinds:
        found = measure_kind(base, name, row, options.length, options.steps)
        plain_ms = plain_ms or (found.get("step_ms") if name == PLAIN else None)
        with options.json.open("a") as file:
            file.write(json.dumps({**facts, "kind": name, **found}, sort_keys=True) + "\n")
        print(line(name, found, plain_ms), flush=True)
    return 0


def make_row(batch: int, length: int, vocab_size: int) -> Batch:
    """Return the row of every step, on the host: `batch` samples of `length` random tokens, all of them targets."""
    random = np.random.default_rng(0)
    return collate([Sample(random.integers(1, vocab_size, length), np.ones(length, bool)) for _ in range(batch)])


def measure_kind(base: Base, name: str, row: Batch, longest: int, steps: int) -> Record:
    """Return what the steps of a kind take, or {"error": reason}; the base is afterwards as before.

    longest: tokens of a sample. steps: timed steps, each time.
    """
    kind, layers = KINDS[name], {}
    if kind.is_paged and base.device.type != "cuda":
        return {"error": "needs a card"}
    try:
        layers |= attach(base.model, base.linear_names, LoraConfig(rank=RANK, **kind.lora), 0)
        found = _measured(_Steps(base, layers, kind, name, row, longest), steps)
    except torch.OutOfMemoryError:
        found = {"error": "out of memory"}
    except EngineError as error:
        found = {"error": first_line(error)}
    finally:
        base.add_noise(None)
        detach(base.model, layers)
        base.checkpoint_activations(Policy.KEEP)
        Recordings.of(base).clear()
    free(base.device)
    return found


class _Steps:
    """Hold the parts of a kind's step: forward and backward, optimizer, and what follows it."""

    def __init__(self, base: Base, layers: dict[str, AnyLora], kind: Kind, name: str, row: Batch, longest: int) -> None:
        self._base, self.row, self._numbers = base, row, itertools.count()
        self.on_card = base.device.type == "cuda"
        self.adapter = FlatAdapter(layers, base.dtype)
        self.adapter.memory.embedding_noise.fill_(kind.noise)
        base.add_noise(self.adapter.memory.embedding_noise if kind.noise else None, self.adapter.memory.noise)
        base.checkpoint_activations(Policy.RECOMPUTE, 1)
        base.model.train()
        self._optimizer = self._made_optimizer(kind)
        size = len(row.input_ids_T), longest
        self.graphs = make_graphs(base, self.adapter.memory, name, *size) if self.on_card else None
        self.parts: dict[str, Callable[[], Any]] = {"pass": self.backward, "optimizer": self.update, "refresh": self.refresh}

    def _made_optimizer(self, kind: Kind) -> torch.optim.Optimizer:
        if kind.is_paged:
            import bitsandbytes

            return bitsandbytes.optim.PagedAdamW8bit([self.adapter.parameter], lr=RATE)
        config = OptimConfig(learning_rate=RATE, **kind.optim)
        optimizer = make_optimizer(self.adapter.parameter, config, self.adapter.num_a, self.adapter.shapes)
        set_learning_rate(optimizer, RATE)
        return optimizer

    def backward(self) -> torch.Tensor:
        """Return the summed loss [] in nats; its mean's gradient is added up."""
        self.adapter.draw_masks(0, next(self._numbers))
        if self.graphs is not None:
            return self.graphs.backward(self.row, self.row.num_targets)
        loss = self._base.loss(self.row.to(self._base.device))
        (loss / self.row.num_targets).backward()
        return loss.detach()

    def update(self) -> None:
        """Clip the gradient and take the optimizer's step."""
        self.adapter.freeze(decays=False)
        nn.utils.clip_grad_norm_(self.adapter.parameter, 1.0)
        self._optimizer.step()

    def refresh(self) -> None:
        """Cast the adapter for the next pass, find DoRA's lengths again, and clear the gradient."""
        self.adapter.refresh()
        self.adapter.zero_grad()

    def wait(self) -> float:
        """Return the time in seconds when the device has done everything."""
        if self.on_card:
            torch.cuda.synchronize()
        return time.perf_counter()


def _measured(one: _Steps, steps: int) -> Record:
    """Time the parts of steps after WARMUP, then `steps` whole ones in a row."""
    if one.on_card:
        torch.cuda.reset_peak_memory_stats()
    seconds: dict[str, list[float]] = {name: [] for name in one.parts}
    losses = []
    for _ in range(WARMUP + steps):
        for name, part in one.parts.items():
            began_s = one.wait()
            said = part()
            seconds[name].append(one.wait() - began_s)
            losses += [said.item()] if name == "pass" else []
    began_s = one.wait()
    for _ in range(steps):
        for part in one.parts.values():
            part()
    whole_s, tokens = (one.wait() - began_s) / steps, len(one.row.input_ids_T)
    return {
        "step_ms": 1e3 * whole_s, "tokens_per_second": tokens / whole_s,
        **{f"{name}_ms": 1e3 * sum(found[WARMUP:]) / steps for name, found in seconds.items()},
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if one.on_card else None,
        "is_recorded": one.graphs is not None, "parameters": one.adapter.parameter.numel(),
        "first_loss": losses[0] / one.row.num_targets, "last_loss": losses[-1] / one.row.num_targets,
    }  # fmt: skip


HEADINGS = f"{'kind':<14}{'ms/step':>9}{'plain is':>10}{'tok/s':>9}{'pass':>9}{'optimizer':>11}{'refresh':>9}{'peak GiB':>10}"


def line(name: str, found: Record, plain_ms: float | None) -> str:
    """Return a kind's row for a terminal. plain_ms: the first step of plain LoRA, if it was measured."""
    if "error" in found:
        return f"{name:<14}{found['error']}"
    ratio = f"{found['step_ms'] / plain_ms:.3f} x" if plain_ms else ""
    parts = f"{found['pass_ms']:>9.1f}{found['optimizer_ms']:>11.2f}{found['refresh_ms']:>9.2f}{found['peak_gib'] or 0:>10.2f}"
    return f"{name:<14}{found['step_ms']:>9.1f}{ratio:>10}{found['tokens_per_second']:>9,.0f}{parts}"


def _kinds(names: Sequence[str] | None) -> list[str]:
    return list(names) if names else [*KINDS, PLAIN]


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.variant_steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--batch", type=_count, default=2, help="samples in a row")
    parser.add_argument("--length", type=_count, default=2048, help="tokens of a sample")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), help="default: all, and plain again")
    parser.add_argument("--steps", type=_count, default=6, help=f"timed steps, after {WARMUP} that are not")
    parser.add_argument("--json", type=Path, required=True, help="file to add a line to for each kind")
    parser.add_argument("--commit", help="commit to record if the code is not in a git checkout")
    options = parser.parse_args(arguments)
    options.kinds = _kinds(options.kinds)
    return options


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
