"""Compare predicted with reserved memory, and predicted with measured speed, on settings that nobody chose.

    python -m engine.bench.drawn_rows --random 80 --seed 1 --budget-s 400 --out FILE.jsonl
    python -m engine.bench.drawn_rows --redo FILE.jsonl --numbers 17 42 --out AGAIN.jsonl
    python -m engine.bench.drawn_rows --summary FILE.jsonl

Shapes of models, adapters, data, plans and memory limits are drawn. Each setting gets the plan that a
trial would get, then three steps, the ladder left out, and an evaluation, under a cap on what torch
may reserve. A step that runs out of memory is a false fit. A line of the file holds the whole
setting. Settings that the file already holds are not measured again. It measures only our engine and
needs a CUDA device, and the card alone if its speeds are to count.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from engine.bench.drawn_rows.drawn_settings import draw_all, train_config
from engine.bench.drawn_rows.drawn_summary import line_of, summary
from engine.bench.drawn_rows.drawn_trial import Trials, has_card
from engine.errors import EngineError, InputError, first_line
from engine.model.device import pick_device
from engine.system.command_line import run
from engine.system.provenance import provenance

MOST_DRAWN = 10_000


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(lambda: _main(_arguments(arguments)), stopped="stopped; the --out file has what was measured")


def _main(options: argparse.Namespace) -> int:
    if options.summary:
        print(summary(read_records(*options.summary)))
        return 0
    settings = list(_settings(options))
    done = read_records(*filter(Path.is_file, [options.out]))
    if not has_card():
        raise SystemExit("engine.bench.drawn_rows: needs a CUDA device; --summary does not")
    device = pick_device("cuda")  # before CUDA starts: it sets up torch's allocator as in a trial
    facts = {"card": torch.cuda.get_device_name(), **provenance(), **({"git.commit": options.commit} if options.commit else {})}
    known = {(record["seed"], record["number"]) for record in done}
    with options.out.open("a") as file:
        for record in measured(device, settings, known, time.monotonic() + options.budget_s):
            file.write(json.dumps({**record, **facts}, sort_keys=True) + "\n")
            file.flush()
            print(line_of(record), flush=True)
            done.append(record)
    print(summary(done))
    return 0


def measured(
    device: torch.device, settings: Iterable[dict[str, Any]], known: set[tuple[int, int]], deadline: float
) -> Iterator[dict[str, Any]]:
    """Yield a record for each setting that is not known, until the time is over. A broken device ends it."""
    trials = Trials(device)
    for values in settings:
        if time.monotonic() > deadline:
            return
        if (values["seed"], values["number"]) in known:
            continue
        began_s = time.monotonic()
        try:
            record = trials.measure(values)
        except Exception as error:  # a finding, as much as a wrong number is
            record = {"fits": False, "failed": f"{type(error).__name__}: {first_line(error)}"}
        yield {**values, **record, "seconds": round(time.monotonic() - began_s, 2)}
        if "failed" in record:
            torch.cuda.synchronize()  # raises if no kernel can run any more
            trials.forget()


def read_records(*files: Path) -> list[dict[str, Any]]:
    """Return the records of files. Raises InputError for a line that is none."""
    found = []
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                record = json.loads(line)
                found.append({**record, **{name: int(record[name]) for name in ("seed", "number")}, "fits": bool(record["fits"])})
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"{file}: line {number}", line[:40], "must be a record of this command") from error
    return found


def _settings(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the settings to measure: drawn, or those of earlier records."""
    if not options.redo:
        yield from draw_all(options.seed, options.random)
        return
    for record in read_records(*options.redo):
        if not options.numbers or record["number"] in options.numbers:
            try:
                values = {key: record[key] for key in ("name", "seed", "number", "shape", "config", "lengths")}
                train_config(values)
            except (KeyError, TypeError, EngineError) as error:
                text = f"engine.bench.drawn_rows: --redo: record {record['number']} is no whole setting: {first_line(error)}"
                raise SystemExit(text) from error
            yield values


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m engine.bench.drawn_rows", description=__doc__, formatter_class=raw)
    parser.add_argument("--random", type=int, metavar="N", help="draw N settings")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing; setting i of a seed is the same at any N")
    parser.add_argument("--redo", type=Path, nargs="+", help="files whose settings are measured again")
    parser.add_argument("--numbers", type=int, nargs="+", help="with --redo: only settings of these numbers")
    parser.add_argument("--summary", type=Path, nargs="+", help="files to sum up")
    parser.add_argument("--out", type=Path, help="file to add records to")
    parser.add_argument("--budget-s", type=float, default=400.0, help="begin no setting after this time")
    parser.add_argument("--commit", help="commit to record if the code is not in a git checkout")
    options = parser.parse_args(arguments)
    if sum(given is not None for given in (options.random, options.redo, options.summary)) != 1:
        parser.error("give one of --random N, --redo FILE and --summary FILE")
    if (options.summary is None) != (options.out is not None):
        parser.error("--out FILE goes with --random and --redo, and --summary has none")
    if options.random is not None and not 1 <= options.random <= MOST_DRAWN:
        parser.error(f"--random must be 1 to {MOST_DRAWN}, not {options.random}")
    if options.numbers and not options.redo:
        parser.error("--numbers goes with --redo")
    if not 0 < options.budget_s < float("inf"):
        parser.error(f"--budget-s must be above 0 seconds, not {options.budget_s:g}")
    for file in (*(options.redo or ()), *(options.summary or ())):
        if not file.is_file():
            parser.error(f"{file} is no file")
    return options


if __name__ == "__main__":
    sys.exit(main())
