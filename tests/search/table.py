"""Print the tables of replays in Markdown.

    python -m tests.search.table results.jsonl more.jsonl

The files are of the same tasks and share of the table. Where two hold the same strategy, slots and
cost, the last one counts. A comparison takes the replays that both sides have.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from .measures import NEAR, difference_interval, interval, ratio_interval
from .result_lines import read_rows
from .strategies import STRATEGIES

OURS, HALVING, PEERS = "freeze_thaw", "random_halving", ("one_look_16", "one_look", "one_look_4", "random_asha")


def print_tables(rows: Sequence[dict[str, Any]], measure: str) -> None:
    """Print one table for each task and number of slots. rows: see result_lines.rows_of. measure: seen or judged."""
    for task in dict.fromkeys(row["task"] for row in rows):
        for slots in dict.fromkeys(row["slots"] for row in rows):
            chosen = [row for row in rows if (row["task"], row["slots"]) == (task, slots)]
            print("\n".join(table(chosen, f"{task}, {slots} slot{'s' if slots > 1 else ''}", measure)) + "\n")


def table(rows: Sequence[dict[str, Any]], title: str, measure: str) -> list[str]:
    """Return the lines: mean regret in thousandths of a nat with its interval, and the share near.

    A cell says how many replays it has if another has more.
    """
    costs = sorted({row["cost"] for row in rows})
    most = max(len(row[measure]) for row in rows)
    lines = [f"| {title} | " + " | ".join(f"cost {cost:g}" for cost in costs) + " | s |"]
    lines.append("|---" * (len(costs) + 2) + "|")
    for name in dict.fromkeys(row["strategy"] for row in rows):
        own = {row["cost"]: row for row in rows if row["strategy"] == name}
        cells = [_cell(own[cost][measure], most) if cost in own else "" for cost in costs]
        seconds = sum(row["seconds"] for row in own.values())
        lines.append(f"| {STRATEGIES[name].text if name in STRATEGIES else name} | {' | '.join(cells)} | {seconds:.0f} |")
    return lines


def cell(regrets: Sequence[float]) -> str:
    """Return mean, interval, and share of replays within NEAR."""
    low, high = interval(regrets)
    share = numpy.mean(numpy.asarray(regrets) <= NEAR)
    return f"{1000 * numpy.mean(regrets):.1f} ({1000 * low:.1f}-{1000 * high:.1f}) {100 * share:.0f} %"


def _cell(regrets: Mapping[int, float], most: int) -> str:
    return cell(list(regrets.values())) + (f", {len(regrets)} replays" if len(regrets) < most else "")


def comparison(rows: Sequence[dict[str, Any]], measure: str) -> list[str]:
    """Return a line for each task, slots and cost: ours against halving and against its peers.

    A ratio is of mean regrets. A peer is named with its mean regret less ours, in thousandths of a
    nat; we are `behind` where the whole interval of the difference says so.
    """
    lines = []
    known = {(row["task"], row["slots"], row["cost"], row["strategy"]): row[measure] for row in rows}
    for task, slots, cost in dict.fromkeys(key[:3] for key in known):
        ours, halving = (known.get((task, slots, cost, name)) for name in (OURS, HALVING))
        if ours is None or halving is None:
            continue
        ours_paired, halving = paired(ours, halving)
        ratio = "{:.2f} ({:.2f}-{:.2f})".format(*ratio_interval(ours_paired, halving)) if halving else "unknown"
        share = 100 * numpy.mean(numpy.asarray(list(ours.values())) <= NEAR)
        peers = [_against(name, ours, known[task, slots, cost, name]) for name in PEERS if (task, slots, cost, name) in known]
        lines.append(f"{task}, {slots} slots, cost {cost:g}: {ratio} of halving's, {share:.0f} % near; {', '.join(peers)}")
    return lines


def paired(ours: Mapping[int, float], other: Mapping[int, float]) -> tuple[list[float], list[float]]:
    """Return the regrets of the replays that both have, by number of the replay."""
    both = sorted(ours.keys() & other.keys())
    return [ours[replay] for replay in both], [other[replay] for replay in both]


def _against(name: str, ours: Mapping[int, float], other: Mapping[int, float]) -> str:
    ours, other = paired(ours, other)
    if not ours:
        return f"{name} unknown"
    mean, low, high = difference_interval(other, ours)
    verdict = " BEHIND" if high < 0 else "" if low > 0 else " level"
    return f"{name} {1000 * mean:+.1f}{verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="written by replay --json")
    parser.add_argument("--measure", default="seen", choices=["seen", "judged"], help="which regret the tables show")
    options = parser.parse_args()
    rows = read_rows(options.files, list(STRATEGIES))
    print_tables(rows, options.measure)
    print("\n".join(comparison(rows, options.measure)))


if __name__ == "__main__":
    main()
