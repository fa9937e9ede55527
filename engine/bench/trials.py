"""Time several trials in one process with a resident base model, as a sweep's worker runs them.

    python -m engine.bench.trials --model smollm2-135m --tokens 800000 --trials 4 --json FILE

The model is a random one of a real shape, and the data are made: prompts and completions of random
words, whose lengths spread as those of chats do. The first trial records its CUDA graphs. The second
differs in values alone, so it finds them. The third has dropout, which makes other recordings, and
the fourth is the second again. More trials begin that round again. A line says what each trial's
time went to; the training's share of it is the steady share.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from engine.bench.model_folder import folder_name, write_checkpoint
from engine.bench.shapes import SHAPES
from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.model.base import Base
from engine.model.device import pick_device
from engine.model.load import load_base
from engine.system.command_line import run
from engine.system.provenance import provenance
from engine.system.shared_cache import CACHE_VARIABLE
from engine.training.loop import train
from engine.trial_report import TRAIN, PartClock

VALUES: dict[str, Any] = {"lora": {"rank": 16, "lora_alpha": 8.0}, "optim": {"learning_rate": 5e-4}}
ROUND: tuple[tuple[str, dict[str, Any]], ...] = (
    ("first", {}),
    ("other values", VALUES),
    ("dropout", {"lora": {"rank": 16, "lora_dropout": 0.05}}),
    ("other values", VALUES),
)
"""Name of each trial of a round, and its sections of the config."""
ROWS_PER_STEP, EVALUATED, NUM_WORDS = 16, 256, 2000
PROMPT, COMPLETION = (4.2, 0.8), (5.2, 0.9)
"""Mean and deviation of the logarithm of a text's length in bytes; a byte is a token."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(lambda: _main(_arguments(arguments)), stopped="stopped; the --json file has the finished trials")


def _main(options: argparse.Namespace) -> int:
    for _, sections in ROUND:  # an error now costs less than after a trial
        _config(options, Path(), sections)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.open("a").close()
    device = pick_device("auto")
    facts = {"card": torch.cuda.get_device_name() if device.type == "cuda" else "CPU", **provenance()}
    facts |= {"git.commit": options.commit} if options.commit else {}
    print(f"{options.model}, {options.tokens:,} tokens a trial, rows of {options.length:,}, {facts['card']}")
    with ExitStack() as stack:
        scratch = options.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="engine-trials-")))
        scratch.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault(CACHE_VARIABLE, str(scratch / "cache"))
        stack.callback(gc.unfreeze)
        base = _base(options, scratch, device)
        for number in range(options.trials):
            record = {**measure_trial(base, options, scratch, number), **facts}
            print(line(record), flush=True)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(record, sort_keys=True) + "\n")
    return 0


def measure_trial(base: Base, options: argparse.Namespace, scratch: Path, number: int) -> dict[str, Any]:
    """Run trial `number` of the round; return its wall seconds, their parts, and its reports' figures."""
    name, sections = ROUND[number % len(ROUND)]
    config = _config(options, scratch, sections)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="trial-") as folder:
        parts = PartClock()
        reports = list(train(config, Path(folder), base=base, parts=parts))
        taken = parts.take()
    wall_s, last = sum(taken.values()), reports[-1]
    return {
        "model": options.model, "length": options.length, "trial": number, "name": name, "tokens": last.tokens_seen,
        "num_reports": len(reports), "wall_s": round(wall_s, 4), "setup_s": round(last.setup_s, 4), "parts_s": taken,
        "tokens_per_second": [round(report.tokens_per_second, 1) for report in reports],
        "steady_share": round(taken[TRAIN] / wall_s, 4),
        "eval_loss": [round(report.eval_loss, 6) for report in reports],
        "peak_allocated_gib": last.peak_allocated_gib, "predicted_peak_gib": last.predicted_peak_gib,
        "micro_batch_size": last.micro_batch_size, "num_out_of_memory": last.num_out_of_memory,
    }  # fmt: skip


def line(record: dict[str, Any]) -> str:
    """Return a trial's record as one line of text."""
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in record["parts_s"].items())
    speed = sorted(record["tokens_per_second"])[record["num_reports"] // 2]
    head = f"trial {record['trial']} ({record['name']}): {record['wall_s']:.2f} s, set-up {record['setup_s']:.2f}"
    return f"{head}, {speed:,.0f} tok/s, steady share {record['steady_share']:.0%}; seconds: {parts}"


def write_samples(file: Path, count: int) -> None:
    """Write prompts and completions of random words, of log-normal lengths, the same ones each time."""
    generator = random.Random(0)
    words = ["".join(map(chr, generator.choices(range(97, 123), k=generator.randint(2, 9)))) for _ in range(NUM_WORDS)]

    def text(length: tuple[float, float]) -> str:
        wanted, found = max(8, int(generator.lognormvariate(*length))), ""
        while len(found) < wanted:
            found += generator.choice(words) + " "
        return found[:wanted]

    rows = ({"prompt": text(PROMPT), "completion": text(COMPLETION)} for _ in range(count))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _base(options: argparse.Namespace, scratch: Path, device: torch.device) -> Base:
    """Make model and data where they are missing, and load the model as a worker does."""
    folder = scratch / folder_name(options.model)
    if not folder.exists():
        write_checkpoint(options.model, folder, device)
    write_samples(_samples(options, scratch), options.samples)
    base = load_base(_config(options, scratch, {}).model, device)
    gc.collect()
    gc.freeze()  # the engine collects after each trial, and need not search model and libraries then
    return base


def _samples(options: argparse.Namespace, scratch: Path) -> Path:
    return scratch / f"samples-{options.samples}.jsonl"


def _config(options: argparse.Namespace, scratch: Path, sections: dict[str, Any]) -> TrainConfig:
    data = {"train": str(_samples(options, scratch)), "eval_max_samples": EVALUATED}
    data |= {"max_seq_length": options.length, "eval_max_seq_length": options.length}
    own = {"max_tokens": options.tokens, "num_reports": options.reports, "tokens_per_step": ROWS_PER_STEP * options.length}
    train_section = {**own, "memory_budget_gib": options.budget_gib}
    common = {"lora": {"rank": 16}, "optim": {"learning_rate": 1e-3}, "data": data, "train": train_section}
    model = {"path": str((scratch / folder_name(options.model)).resolve())}
    return parse(TrainConfig, {"model": model, **common, **sections})


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=800_000, help="of each trial")
    parser.add_argument("--trials", type=int, default=len(ROUND))
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row; 16 rows are a step")
    parser.add_argument("--reports", type=int, default=5, help="of each trial; each evaluates up to 256 samples and saves")
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--budget-gib", type=float, default=23.5, help="device memory that a trial may use")
    parser.add_argument("--scratch", type=Path, help="folder to keep model and cache in for later runs; default: temporary")
    parser.add_argument("--json", type=Path, help="file to add a line to for each trial")
    parser.add_argument("--commit", help="commit to record if the code is not in a git checkout")
    options = parser.parse_args(arguments)
    for name in ("trials", "samples"):
        if (number := getattr(options, name)) < 1:
            parser.error(f"--{name} must be at least 1, not {number}")
    return options


if __name__ == "__main__":
    sys.exit(main())
