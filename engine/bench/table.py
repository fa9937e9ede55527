"""Make Markdown tables from the JSON lines of engine.bench.

    python -m engine.bench.table FILE...

There is one table per setting and card, with our speed as a multiple of each other system's, and
one per ladder. If a row was measured twice, the later one counts. No torch.
"""

from __future__ import annotations

import argparse
import json
import string
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from engine.bench.rows import POLICIES
from engine.system.command_line import run

PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "peft", "liger-kernel", "unsloth", "axolotl")
# The rows of a table agree in SETTING and differ in OURS.
SETTING = ("model", "batch", "length", "rank", "dropout", "policy", "cap_gib", "card")
OURS = ("system", "keep_layers", "host_layers", "weight_cache_gib", "cuda_graphs", "matmul")
LADDER = ("model", "batch", "length", "rank", "dropout", "cap_gib", "card")
Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    return run(lambda: _main(arguments))


def _main(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    print(report(read(parser.parse_args(arguments).files)))
    return 0


def read(files: list[Path]) -> list[Record]:
    """Return all lines of all files, in order, as records."""
    return [json.loads(line) for file in files for line in file.read_text().splitlines() if line.strip()]


def report(records: list[Record]) -> str:
    """Return the tables, each followed by card, versions and commit."""
    settings = _groups([r for r in records if r["suite"] != "ladder"], SETTING, OURS)
    ladders = _groups([r for r in records if r["suite"] == "ladder"], LADDER, ("label",))
    return "\n\n".join([_setting_table(group) for group in settings] + [_ladder_table(group) for group in ladders])


def describe(record: Record) -> str:
    """Return the setting in words; for a ladder, only the part that its rows share."""
    parts = [record["model"], f"{record['batch']} x {record['length']} tokens", f"r {record['rank']}"]
    if record["dropout"]:
        parts.append(f"dropout {record['dropout']}")
    if record["suite"] != "ladder":
        parts.append(f"activations {POLICIES[record['policy']]}")
    if record["cap_gib"]:
        parts.append(f"capped at {record['cap_gib']} GiB")
    return ", ".join(parts)


def headings(width: int) -> str:
    """Return the headings to print over `line`s in a terminal."""
    names = f"{'tok/s':>9}{'ms/step':>9}{'peak GiB':>10}{'host GiB':>10}{'first step s':>14}{'first loss':>12}{'last loss':>11}"
    return f"{'system':<{width}}{names}"


def line(record: Record, width: int) -> str:
    """Return one row for a terminal. Equal losses show that systems compute the same."""
    label = f"{record['label']:<{width}}"
    if "error" in record:
        return label + record["error"]
    return (
        f"{label}{record['tokens_per_second']:>9,.0f}{record['step_time_ms']:>9.1f}{record['peak_allocated_gib']:>10.2f}"
        f"{_host(record):>10}{record['first_step_s']:>14.1f}"
        f"{record['first_loss']:>12.4f}{record['last_loss']:>11.4f}"
    )


def _groups(records: list[Record], shared: tuple[str, ...], identity: tuple[str, ...]) -> list[list[Record]]:
    groups: dict[tuple, dict[tuple, Record]] = {}
    for record in records:
        group = groups.setdefault(tuple(record[name] for name in shared), {})
        group[tuple(record.get(name) for name in identity)] = record
    return [list(group.values()) for group in groups.values()]


def _setting_table(group: list[Record]) -> str:
    ours = max((_speed(r) for r in group if r["system"] == "ours"), default=0.0)
    rows = []
    for record in group:
        ratio = "" if record["system"] == "ours" else _ratio(ours, _speed(record))
        rows.append((_name(record), record, [ratio]))
    return _table(describe(group[0]), ["ours is"], rows)


def _ladder_table(group: list[Record]) -> str:
    speeds = [_speed(record) for record in group]
    ratios = [["", ""], *([_ratio(now, before), _ratio(now, speeds[0])] for before, now in pairwise(speeds))]
    rows = [(record["label"], record, ratio) for record, ratio in zip(group, ratios, strict=True)]
    return _table(f"Ladder: {describe(group[0])}", ["over the row before", "over the first"], rows)


def _table(title: str, ratios: list[str], rows: list[tuple[str, Record, list[str]]]) -> str:
    """Return a Markdown table; letters mark rows measured with different versions or commits."""
    places = list(dict.fromkeys(_place(record) for _, record, _ in rows))
    letters = [f"({letter}) " for letter in string.ascii_lowercase[: len(places)]] if len(places) > 1 else [""]
    columns = ["system", "tok/s", "ms/step", "peak GiB", "host GiB", "first step s", *ratios]
    lines = [f"**{title}**", "", f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    for name, record, values in rows:
        mark = letters[places.index(_place(record))].strip()
        lines.append(f"| {' | '.join([f'{name} {mark}'.strip(), *_cells(record), *values])} |")
    return "\n".join([*lines, "", *(letter + place for letter, place in zip(letters, places, strict=True))])


def _cells(record: Record) -> list[str]:
    if "error" in record:
        return [record["error"].replace("|", "\\|"), "", "", "", ""]
    return [
        f"{record['tokens_per_second']:,.0f}",
        f"{record['step_time_ms']:.1f}",
        f"{record['peak_allocated_gib']:.2f}",
        _host(record),
        f"{record['first_step_s']:.1f}",
    ]


def _host(record: Record) -> str:
    """Return the GiB of host memory for activations, or nothing if the system does not tell."""
    gib = record.get("host_gib")
    return "" if gib is None else f"{gib:.1f}"


def _name(record: Record) -> str:
    cache, kept = record["weight_cache_gib"], record["keep_layers"]
    on_host, some = record.get("host_layers", 0), kept > 1 and record["policy"] != "keep"
    parts = [
        record["system"],
        *([f"{kept} layers kept"] if some else []),
        *([f"{on_host} kept on the host"] if on_host else []),
        *([f"weight cache {cache:g} GiB"] if cache else []),
        *(["CUDA graphs"] if record.get("cuda_graphs") else []),
        *([record["matmul"]] if record.get("matmul", "bf16") != "bf16" else []),
    ]
    return ", ".join(parts)


def _place(record: Record) -> str:
    versions = [f"{name} {record[f'version.{name}']}" for name in PACKAGES if f"version.{name}" in record]
    commit = [f"commit {record['git.commit'][:9]}{'+changes' * record['git.commit'].endswith('+changes')}"]
    return ", ".join([record["card"], *versions, *(commit if record["git.commit"] else []), f"{record['steps']} steps"])


def _speed(record: Record) -> float:
    return record.get("tokens_per_second", 0.0)


def _ratio(value: float, other: float) -> str:
    return f"{value / other:.2f} x" if value and other else ""


if __name__ == "__main__":
    sys.exit(main())
