"""Measure training steps of a mixture of experts: ours, Unsloth's and PEFT's, each in a process of its own.

    python -m tests.bench.mixtures --model gpt-oss-20b --systems ours unsloth peft --policy keep \\
        --peer-path SITE --scratch DIR --json FILE
    python -m tests.bench.mixtures --model gpt-oss-20b --systems unsloth --no-compile --peer-path SITE --json FILE
    python -m tests.bench.mixtures --model qwen3-30b-a3b --layers 12 --systems ours unsloth --peer-path SITE --json FILE
    python -m tests.bench.mixtures --model qwen3-30b-a3b --systems ours --weight-cache-gib 1 --offload-optimizer --json FILE

Weights are random ones of the real shape. All train adapters on attention and on all experts, one
row of one sample a step, with 8-bit AdamW, under one cap from before the model is loaded. Ours has
NF4 experts and recorded passes. Unsloth has the settings of its notebooks and reads a folder in the
layout that it is published in. PEFT holds the experts in 16 bits.

The first steps are timed one by one, the steady ones by the card's clock, without waiting; their
median counts. Caches of compiled kernels begin empty unless TRITON_CACHE_DIR, TORCHINDUCTOR_CACHE_DIR
or QLORA_SWEEP_CACHE names a folder. Peaks after the load include preparation. A process that fails
or runs out of time leaves what it had measured, with the reason. Our row has our predictions for
the card too. For dense models, and for ours among other settings, there is `python -m engine.bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.bench.process import run_python, run_python_all, scratch_folder
from engine.bench.rows import Setting
from engine.bench.shapes import SHAPES
from engine.system.command_line import run
from tests.bench.mixtures.builders import mixtures
from tests.bench.mixtures.folder import folder_name
from tests.bench.mixtures.job import OURS, SYSTEMS, TARGETS, UNSLOTH, MixtureRow, rows_of

Record = dict[str, Any]
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "QLORA_SWEEP_CACHE")
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(lambda: _main(_arguments(arguments)), stopped="stopped; the --json file has the finished rows")


def _main(options: argparse.Namespace) -> int:
    setting = Setting(
        model=options.model, batch=1, length=options.length, rank=options.rank, policy=options.policy, cap_gib=options.cap_gib,
        keep_layers=options.keep_layers, weight_cache_gib=options.weight_cache_gib, cuda_graphs=options.cuda_graphs,
        steps=options.steps, targets=TARGETS,
    )  # fmt: skip
    rows = rows_of(
        options.systems, setting, options.layers, options.ragged, options.offload_optimizer, compiles=not options.no_compile
    )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    print(f"{options.model}, {options.layers} layers, 1 x {options.length} tokens, r {options.rank}\n{HEADINGS}", flush=True)
    with scratch_folder(options.scratch, "mixtures-") as scratch:
        for row in rows:
            commit = {"git.commit": options.commit} if options.commit else {}
            record = {**row.record(), **run_row(row, options.peer_path, scratch, options.child_timeout_s), **commit}
            with options.json.open("a") as file:
                file.write(json.dumps(record, sort_keys=True) + "\n")
            print(line(record), flush=True)
    return 0


def run_row(row: MixtureRow, peer_path: Path | None, scratch: Path, timeout_s: float) -> Record:
    """Return what the row's process handed back, and its `error` if it failed.

    peer_path: packages that come first for other systems. scratch: an absolute path, whose model
    folders are used again.
    """
    folder = scratch / folder_name(row.setting.model, row.layers)
    if row.system == UNSLOTH and not folder.exists():
        arguments = ["-m", "tests.bench.mixtures.folder", row.setting.model, str(row.layers), str(folder)]
        made = run_python(arguments, scratch, timeout_s, NO_GPU)
        if "error" in made:
            return {"error": f"no model folder: {made['error']}"}
    with tempfile.TemporaryDirectory(dir=scratch, prefix=f"{row.system}-", ignore_cleanup_errors=True) as place:
        arguments = ["-m", "tests.bench.mixtures.child", json.dumps(asdict(row)), str(folder)]
        parts = run_python_all(arguments, Path(place), timeout_s, variables_of(row, peer_path, Path(place)))
    return {name: value for part in parts for name, value in part.items()}


def variables_of(row: MixtureRow, peer_path: Path | None, place: Path) -> dict[str, str]:
    """Return the variables of the row's process: its caches, where it finds packages, and whether Unsloth compiles."""
    found = {name: os.environ.get(name) or str(place / name.lower()) for name in CACHES}
    if peer_path is not None and row.system != OURS:
        found["PYTHONPATH"] = os.pathsep.join([str(peer_path.resolve()), os.environ.get("PYTHONPATH", "")])
    if row.system == UNSLOTH and not row.compiles:
        found["UNSLOTH_COMPILE_DISABLE"] = "1"
    return found


HEADINGS = (
    f"{'system':<24}{'tok/s':>9}{'ms/step':>9}{'first step s':>14}{'peak GiB':>10}{'reserved':>10}{'loaded':>8}"
    f"{'first loss':>12}{'last loss':>11}"
)


def line(record: Record) -> str:
    """Return a row for a terminal, with what is known of it."""

    def cell(name: str, width: int, form: str) -> str:
        return f"{record[name]:>{width}{form}}" if name in record else " " * width

    cells = (
        cell("tokens_per_second", 9, ",.0f"), cell("step_time_ms", 9, ".1f"), cell("first_step_s", 14, ".1f"),
        cell("peak_allocated_gib", 10, ".2f"), cell("peak_reserved_gib", 10, ".2f"), cell("loaded_gib", 8, ".2f"),
        cell("first_loss", 12, ".4f"), cell("last_loss", 11, ".4f"),
    )  # fmt: skip
    return f"{record['label']:<24}{''.join(cells)}{'  ' + record['error'] if 'error' in record else ''}".rstrip()


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.mixtures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Setting()
    parser.add_argument("--model", choices=mixtures(), default="gpt-oss-20b")
    parser.add_argument("--layers", type=int, help="of the model; default: all that the shape has")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--rank", type=int, default=default.rank)
    parser.add_argument("--cap-gib", type=float, default=23.5, help="emulate a smaller card for all systems")
    parser.add_argument("--policy", choices=("recompute", "keep"), default="recompute", help="ours only; others recompute")
    parser.add_argument("--keep-layers", type=int, default=0, help="ours only: last layers that keep all")
    parser.add_argument("--weight-cache-gib", type=float, default=2.0, help="ours only: room for dequantised experts")
    parser.add_argument("--no-cuda-graphs", dest="cuda_graphs", action="store_false", help="ours only: record no passes")
    parser.add_argument("--offload-optimizer", action="store_true", help="ours only: states of the optimizer on the host")
    parser.add_argument("--ragged", action="store_true", help="ours only: rows full of samples of log-normal lengths")
    parser.add_argument("--no-compile", action="store_true", help="Unsloth only: UNSLOTH_COMPILE_DISABLE=1")
    parser.add_argument("--steps", type=int, default=6, help="steady steps, whose median counts")
    parser.add_argument("--peer-path", type=Path, help="folder of packages that comes first for the other systems")
    parser.add_argument("--scratch", type=Path, help="folder to keep Unsloth's model in (gpt-oss-20b: 14 GB); default: temporary")
    parser.add_argument("--child-timeout-s", type=float, default=600.0, help="time limit of each process")
    parser.add_argument("--json", type=Path, required=True, help="file to add a line to for each system")
    parser.add_argument("--commit", help="commit to record if the code is not in a git checkout")
    options = parser.parse_args(arguments)
    options.layers = SHAPES[options.model]["num_hidden_layers"] if options.layers is None else options.layers
    for name in ("layers", "length", "rank", "steps", "child_timeout_s"):
        if not getattr(options, name) >= 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    if options.peer_path is not None and not options.peer_path.is_dir():
        parser.error(f"--peer-path {options.peer_path}: must be a folder")
    if options.ragged and options.systems != [OURS]:
        parser.error("--ragged: the others' rows are one sample, so give --systems ours")
    return options


if __name__ == "__main__":
    sys.exit(main())
