"""Measure tokens per second and peak memory of whole training steps, ours next to other systems.

    python -m engine.bench --model llama-3.1-8b --batch 2 --length 2048 --systems ours peft unsloth
    python -m engine.bench --suite table --json results.jsonl --scratch /tmp/bench --budget-s 900
    python -m engine.bench --suite ladder --model llama-3.2-1b --batch 4 --json results.jsonl
    python -m engine.bench.table results.jsonl

All systems have the same random NF4 weights and the same tokens, and every token is a label. They
train adapters on all linear layers with 8-bit AdamW. Each system runs in a separate process and
loads each model once, or once per setting if it loads from a folder. `--json FILE` gets a line as
soon as a row is done, with card, versions and commit.
"""

from __future__ import annotations

import engine.system.no_working_folder  # noqa: F401 (must be the first)

# isort: split
import argparse
import json
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from engine.bench.children import card_name, run_rows
from engine.bench.measure import measure
from engine.bench.process import hand_back, scratch_folder
from engine.bench.rows import POLICIES, SUITES, Row, Setting, plain_rows, suite_rows
from engine.bench.shapes import SHAPES
from engine.bench.systems import SYSTEMS
from engine.bench.table import describe, headings, line, report
from engine.config.matmul import Matmul
from engine.system.command_line import run
from engine.system.provenance import package_tags, provenance


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(lambda: _main(_arguments(arguments)), stopped="stopped; the --json file has the finished rows")


def _main(options: argparse.Namespace) -> int:
    """Run every row in a subprocess, or (with --child) measure one system here."""
    if options.child:
        settings = [Setting(**values) for values in json.loads(options.settings)] if options.settings else [_setting(options)]
        for result in measure(options.child, settings, options.checkpoint):
            hand_back(result)
        return 0
    rows = _rows(options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(options.scratch, "engine-bench-") as scratch:
        facts = {"card": card_name(scratch), **_provenance(options.commit)}
        records = _run(rows, options, scratch, facts)
    if options.suite and records:
        print("\n" + report(records))
    measured = [record["label"] + describe(record) for record in records]
    left_out = [row for row in rows if row.label + describe(row.record()) not in measured]
    if left_out:
        print(f"\n--budget-s {options.budget_s:g} is used up; rows not measured:")
        print("\n".join(f"  {row.label}: {describe(row.record())}" for row in left_out))
    return 0


def _run(rows: list[Row], options: argparse.Namespace, scratch: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the rows within the budget and return one record for each.

    Each record is written as soon as it is ready, and printed in the order of the rows.
    """
    started, width, heading = time.monotonic(), max(len(row.label) for row in rows) + 2, ""
    records: list[dict[str, Any]] = []
    done: dict[Row, dict[str, Any]] = {}
    for row in rows:
        if options.budget_s is not None and time.monotonic() - started >= options.budget_s and row not in done:
            continue
        if describe(row.record()) != heading:
            heading = describe(row.record())
            print(f"{heading}, {facts['card']}\n{headings(width)}", flush=True)
        if row not in done:  # run it together with all rows that can share its process
            group = [r for r in rows if (r.system, r.setting.model) == (row.system, row.setting.model) and r not in done]
            group = [row] if SYSTEMS[row.system].from_folder else group
            results = run_rows(group, scratch, options.child_timeout_s)
            done.update({one: {**one.record(), **result, **facts} for one, result in zip(group, results, strict=True)})
            _write(options.json, [done[one] for one in group])
        records.append(done[row])
        print(line(done[row], width), flush=True)
    return records


def _write(file: Path | None, records: list[dict[str, Any]]) -> None:
    if file is not None:
        with file.open("a") as lines:
            lines.write("".join(json.dumps(record, sort_keys=True) + "\n" for record in records))


def _rows(options: argparse.Namespace) -> list[Row]:
    base, systems = _setting(options), options.systems or list(SYSTEMS)
    if not options.suite:
        return plain_rows(systems, base, options.matmul)
    rows = [row for name in options.suite for row in suite_rows(name, systems, base, options.matmul)]
    return [row for row in dict.fromkeys(rows) if options.only is None or row.setting.model in options.only]


def _targets(text: str) -> str | tuple[str, ...]:
    """Return one group's name, or several names."""
    return tuple(text.split(",")) if "," in text else text


def _setting(options: argparse.Namespace) -> Setting:
    values = {field.name: getattr(options, field.name) for field in fields(Setting)}
    return Setting(**{**values, "matmul": options.matmul[0]})


def _provenance(commit: str | None) -> dict[str, str]:
    others = package_tags(("liger-kernel", "unsloth", "axolotl"))  # other systems, which the engine does not use
    facts = {"git.commit": "", **provenance(), **others}
    return {**facts, **({"git.commit": commit} if commit else {})}


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = parser.add_mutually_exclusive_group()
    several.add_argument(
        "--suite", nargs="+", choices=[*SUITES, "ladder"], help="named lists of settings; ladder: each row adds one optimisation"
    )
    several.add_argument("--child", choices=list(SYSTEMS), help="measure this system in this process (for profilers)")
    default = Setting()
    parser.add_argument("--model", choices=sorted(SHAPES), default=default.model)
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--length", type=int, default=default.length)
    parser.add_argument("--rank", type=int, default=default.rank)
    parser.add_argument("--dropout", type=float, default=default.dropout)
    parser.add_argument("--targets", type=_targets, default=default.targets, help="ours only: as lora.target_modules, by commas")
    parser.add_argument(
        "--policy", choices=list(POLICIES), default=default.policy, help="other systems: gradient checkpointing, or none"
    )
    parser.add_argument("--cap-gib", type=float, default=default.cap_gib, help="emulate a smaller card")
    parser.add_argument("--keep-layers", type=int, default=default.keep_layers, help="ours only: last layers that keep all")
    parser.add_argument(
        "--host-layers", type=int, default=default.host_layers, help="ours only: other layers that keep all on the host"
    )
    parser.add_argument(
        "--weight-cache-gib", type=float, default=default.weight_cache_gib, help="ours only: for dequantised weights"
    )
    parser.add_argument("--cuda-graphs", action="store_true", help="ours only")
    modes = [mode.value for mode in Matmul]
    parser.add_argument("--matmul", nargs="+", choices=modes, default=modes[:1], help="ours only: a row in each of these modes")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--warmup", type=int, default=default.warmup, help="first steps, left out of the times")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), help="default: all")
    parser.add_argument("--only", nargs="+", choices=list(SHAPES), help="with --suite: only rows of these models")
    parser.add_argument("--scratch", type=Path, help="folder to keep models in for later runs (5 GiB at 8B); default: temporary")
    parser.add_argument("--settings", help="with --child: JSON list of settings of one model, instead of the options")
    parser.add_argument("--checkpoint", type=Path, help="with --child: a folder made by engine.bench.model_folder")
    parser.add_argument("--child-timeout-s", type=float, default=300.0, help="time limit per row")
    parser.add_argument("--budget-s", type=float, help="start no more rows after this time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", help="commit to record if the code is not in a git checkout")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
