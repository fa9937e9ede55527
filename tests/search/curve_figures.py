"""Print what recorded curves say of schedules, averages and seeds.

    python -m tests.search.curve_figures --curves tests/search/curves

For each task: Spearman's correlation of the losses at each rung with the final ones (of the last
adapter, of the running average, of the lower of both), what average and constant rate change at the
end, and how far two seeds of one config are apart.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from .measures import interval, rank_correlations
from .recorded_tasks import ADAPTERS, CURVE_FILES, content_of, losses_of

Trials = Sequence[Mapping[str, Any]]


def figures(content: Mapping[str, Any]) -> list[str]:
    """Return the lines of one task. content: of its curve file."""
    about, trials = content["task"], [trial for trial in content["trials"] if trial["outcome"] in ("COMPLETE", "DIVERGED")]
    cosine = [trial for trial in trials if trial["lr_schedule"] == "cosine" and trial["seed"] == 0]
    num_diverged = sum(trial["outcome"] == "DIVERGED" for trial in cosine)
    lines = [f"## {about['name']}: {len(cosine)} configs ({num_diverged} diverged), {len(trials)} trials"]
    for adapter in ADAPTERS:
        if adapter == "last" or all(trial["average"] for trial in cosine if trial["loss"]):
            finals = [min(losses_of(trial, "kept"), default=math.inf) if _done(trial) else math.inf for trial in cosine]
            found = rank_correlations([losses_of(trial, adapter) for trial in cosine], finals)
            lines.append(f"Spearman with the final loss, {adapter}: " + " ".join(f"{value:.2f}" for value in found))
    lines.append(_change("average - last, final, cosine", [(trial, trial) for trial in cosine], "last", "average"))
    for kind in ADAPTERS:
        lines.append(_change(f"constant, {kind} - cosine, last; final", twins(trials), "last", kind))
    spread, count = seed_spread(trials)
    return [*lines, f"seeds: standard deviation of one seed {1000 * spread:.2f} e-3 nats, from {count} pairs"]


def twins(trials: Trials) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return (cosine, constant) of each config that was trained with both, at seed 0."""
    constant = {trial["config"]: trial for trial in trials if trial["lr_schedule"] == "constant" and trial["seed"] == 0}
    first = [trial for trial in trials if trial["lr_schedule"] == "cosine" and trial["seed"] == 0]
    return [(trial, constant[trial["config"]]) for trial in first if trial["config"] in constant]


def seed_spread(trials: Trials) -> tuple[float, int]:
    """Return the standard deviation of the final loss over seeds, in nats, and the number of pairs.

    It is the root mean square of the differences of two seeds, divided by the root of two.
    """
    finals: dict[tuple[int, str], list[float]] = {}
    for trial in trials:
        if _done(trial):
            finals.setdefault((trial["config"], trial["lr_schedule"]), []).append(trial["loss"][-1])
    gaps = [known[0] - known[1] for known in finals.values() if len(known) == 2]
    return (float(numpy.sqrt(numpy.mean(numpy.square(gaps)) / 2)) if gaps else math.nan), len(gaps)


def _change(title: str, pairs: Sequence[tuple], before: str, after: str) -> str:
    known = [(losses_of(a, before)[-1], losses_of(b, after)[-1]) for a, b in pairs if _done(a) and _done(b)]
    if not known:
        return f"{title}: none recorded"
    change = [b - a for a, b in known]
    low, high = interval(change)
    best = min(b for _, b in known) - min(a for a, _ in known)
    return (
        f"{title}: mean {1000 * numpy.mean(change):+.1f} e-3 nats (95 % {1000 * low:+.1f} to {1000 * high:+.1f}), median "
        f"{1000 * numpy.median(change):+.1f}, lower in {sum(c < 0 for c in change)} of {len(change)}, best {1000 * best:+.1f}"
    )


def _done(trial: Mapping[str, Any]) -> bool:
    return trial["outcome"] == "COMPLETE"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, required=True, help="folder with recorded curves, one file a task")
    for file in sorted(parser.parse_args().curves.glob(CURVE_FILES)):
        print("\n".join(figures(content_of(file))) + "\n")


if __name__ == "__main__":
    main()
