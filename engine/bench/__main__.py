"""python -m engine.bench: tokens per second and peak memory of whole training steps, ours beside the library stack.

    python -m engine.bench --model llama-3.1-8b --batch 2 --length 2048 --systems ours ours-unfused peft

Each system runs in a process of its own on the same random weights' shape, the same tokens, every token a label, r 16 on all
linear layers, 8-bit AdamW. Printed as a table; `--json FILE` appends one line per run with card, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.bench.shapes import SHAPES, random_base, random_model
from engine.config import LoraConfig
from engine.lora import FlatAdapter, attach
from engine.loss import linear_cross_entropy
from engine.metrics import GIB
from engine.model import pick_device, pick_dtype
from engine.packing import Batch, Sample, collate
from engine.provenance import provenance
from engine.quant import adamw_8bit

SYSTEMS = ("ours", "ours-unfused", "peft")
WARMUP = 3


def main() -> int:
    """Run every system in a subprocess, or (with --child) one of them here."""
    options = _arguments()
    if options.child:
        print(json.dumps(measure(options)))
        return 0
    rows = [_run_child(system, sys.argv[1:]) for system in options.systems]
    print(_table(rows, options))
    if options.json:
        with options.json.open("a") as file:
            file.writelines(json.dumps({**row, **_facts(options)}, sort_keys=True) + "\n" for row in rows)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Median step over `--steps` steps after warm-up, and the peak of allocated memory."""
    device = pick_device("auto")
    if options.cap_gib and device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(options.cap_gib * GIB / torch.cuda.get_device_properties(0).total_memory)
    started = time.perf_counter()
    step, parameters, after_step = _peft_step(options, device) if options.child == "peft" else _our_step(options, device)
    optimizer = adamw_8bit(parameters, lr=2e-4)
    loaded, losses, seconds = time.perf_counter() - started, [], []
    _synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number in range(WARMUP + options.steps):
        _synchronize(device)
        began = time.perf_counter()
        loss = step(_tokens(options, number, device))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        after_step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    median = sorted(seconds[WARMUP:])[options.steps // 2]
    return {
        "system": options.child,
        "tokens_per_second": options.batch * options.length / median,
        "step_time_ms": 1000 * median,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0,
        "first_step_s": seconds[0],
        "load_s": loaded,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def _our_step(options: argparse.Namespace, device: torch.device) -> tuple[Any, list[nn.Parameter], Any]:
    base = random_base(options.model, device, pick_dtype("auto", device), fused=options.child == "ours")
    layers = attach(base.model, base.linear_names, LoraConfig(rank=options.rank, lora_dropout=options.dropout), 0)
    adapter = FlatAdapter(layers, base.dtype)
    base.recompute_activations(not options.keep)
    base.model.train()

    def step(batch: Batch) -> torch.Tensor:
        loss = linear_cross_entropy(base.hidden_states(batch), batch.labels_T, base.head()) / batch.num_targets
        loss.backward()
        return loss.detach()

    def after_step() -> None:
        adapter.refresh()
        adapter.zero_grad()

    return step, [adapter.parameter], after_step


def _peft_step(options: argparse.Namespace, device: torch.device) -> tuple[Any, list[nn.Parameter], Any]:
    """Hugging Face's model, PEFT's adapter and bitsandbytes' matmul, as TRL puts them together."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model, prepare_model_for_kbit_training

    dtype = pick_dtype("auto", device)
    model, _ = random_model(options.model, device, dtype, "sdpa")
    model.is_loaded_in_4bit = True
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=not options.keep, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = PeftConfig(r=options.rank, lora_alpha=2 * options.rank, lora_dropout=options.dropout, target_modules=targets)
    model = get_peft_model(model, config).train()

    def step(batch: Batch) -> torch.Tensor:
        ids = batch.input_ids_T.view(options.batch, options.length)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def after_step() -> None:
        model.zero_grad(set_to_none=True)

    return step, [p for p in model.parameters() if p.requires_grad], after_step


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _card() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _tokens(options: argparse.Namespace, number: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(number)
    shape = (options.batch, options.length)
    ids = torch.randint(0, SHAPES[options.model]["vocab_size"], shape, generator=generator).numpy()
    return collate([Sample(row, row >= 0) for row in ids]).to(device)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--keep", action="store_true", help="keep activations instead of recomputing them")
    parser.add_argument("--cap-gib", type=float, help="emulate a smaller card")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", help="where the code is not in a git checkout")
    parser.add_argument("--child", choices=SYSTEMS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _run_child(system: str, arguments: list[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "engine.bench", *arguments, "--child", system], capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines() or ["no message"]
    return {"system": system, "error": "out of memory" if "OutOfMemoryError" in done.stderr else lines[-1]}


def _table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    policy, shape = "kept" if options.keep else "recomputed", f"{options.batch} x {options.length}"
    lines = [f"{options.model}, {shape}, r {options.rank}, activations {policy}, {_card()}"]
    lines.append(
        f"{'system':<14}{'tok/s':>9}{'ms/step':>9}{'peak GiB':>10}{'first step s':>14}{'first loss':>12}{'last loss':>11}"
    )
    for row in rows:
        if "error" in row:
            lines.append(f"{row['system']:<14}{row['error']}")
            continue
        lines.append(
            f"{row['system']:<14}{row['tokens_per_second']:>9,.0f}{row['step_time_ms']:>9.1f}{row['peak_allocated_gib']:>10.2f}"
            f"{row['first_step_s']:>14.1f}{row['first_loss']:>12.4f}{row['last_loss']:>11.4f}"
        )
    return "\n".join(lines)


def _facts(options: argparse.Namespace) -> dict[str, Any]:
    shape = {k: getattr(options, k) for k in ("model", "batch", "length", "rank", "dropout", "keep", "cap_gib", "steps")}
    commit = {"git.commit": options.commit} if options.commit else {}
    return {**shape, "card": _card(), **provenance(), **commit}


if __name__ == "__main__":
    sys.exit(main())
