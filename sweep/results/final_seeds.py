"""Tell how much the losses of the best trials depend on the seed.

The finalists were trained again with other seeds in `final-seeds/`, a sweep folder of its own.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sweep.config.sweep import NUM_FINALISTS
from sweep.folder.sweep_folder import SweepFolder
from sweep.study.journal import read_records
from sweep.trials.objectives import EVAL_LOSS
from sweep.trials.record import Outcome, TrialRecord
from sweep.trials.selection import Rule

SEED = "train.seed"


@dataclass(frozen=True)
class SeedLosses:
    """Hold the eval_loss of one config with several seeds, that of the sweep's own trial first.

    trial: its number in the sweep. folders: of the trials, one for each seed. measure: what the
    numbers are, if a task metric decides in place of eval_loss.
    """

    trial: int
    seeds: tuple[int, ...]
    losses: tuple[float, ...]
    folders: tuple[str, ...]
    measure: str = EVAL_LOSS

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def deviation(self) -> float:
        """Return the standard deviation over the seeds, with n - 1 in the denominator."""
        return statistics.stdev(self.losses)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        values = asdict(self)
        if self.measure == EVAL_LOSS:
            del values["measure"]
        return {**values, "mean": self.mean, "standard_deviation": self.deviation}


def finalists(rule: Rule, records: list[TrialRecord]) -> list[TrialRecord]:
    """Return the winner, and of the other COMPLETE contenders the one with the lowest loss.

    That is the lowest of all if the winner is a smaller adapter that was not told apart from it. A
    stopped trial has seen fewer tokens than it would with another seed, so it is none of them. Nor is a
    warm clone: the seed of what its parent had learnt would stay.
    """
    able = [record for record in rule.contenders(records) if record.outcome is Outcome.COMPLETE and record.warm is None]
    first = rule.best(able)
    ranked = sorted(able, key=lambda record: (record is not first, record.score, record.number))
    return ranked[:NUM_FINALISTS]


def read_final_seeds(folder: SweepFolder, records: Sequence[TrialRecord]) -> tuple[SeedLosses, ...]:
    """Return the losses of each config that was trained to its end with more than one seed.

    records: the sweep's. The configs come in the order of their own trials' losses.
    """
    again = SweepFolder(folder.final_seeds)
    if not again.journal.is_file():
        return ()
    own = [record for record in records if record.source is None and record.warm is None and record.outcome is Outcome.COMPLETE]
    judged_by = {"metrics": own[0].config.get("metrics")} if own else {}
    repeats = [record for record in read_records(again, lambda params: judged_by)[1] if record.outcome is Outcome.COMPLETE]
    found = []
    for record in sorted(own, key=lambda record: (record.score, record.number)):
        same = [repeat for repeat in repeats if without_seed(repeat.params) == record.params]
        if same:
            trials = [record, *same]
            seeds = (record.config["train"]["seed"], *(repeat.params[SEED] for repeat in same))
            losses, folders = tuple(one.sign * one.score for one in trials), tuple(one.folder for one in trials)
            found.append(SeedLosses(record.number, seeds, losses, folders, record.chosen_by))
    return tuple(found)


def without_seed(params: dict[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in params.items() if path != SEED}


def pooled_deviation(found: Sequence[SeedLosses]) -> float | None:
    """Return the standard deviation of a loss over seeds, from all configs together; None without any.

    The squares of the deviations are weighted by their degrees of freedom.
    """
    degrees = [len(one.losses) - 1 for one in found]
    if not degrees:
        return None
    return math.sqrt(sum(one.deviation**2 * degree for one, degree in zip(found, degrees, strict=True)) / sum(degrees))


def seeds_text(found: Sequence[SeedLosses]) -> str | None:
    """Say in a line what the seeds change; None if nothing was trained again."""
    if not found:
        return None
    parts = []
    for one in found:
        each = ", ".join(f"{loss:.4f} (seed {seed})" for loss, seed in zip(one.losses, one.seeds, strict=True))
        parts.append(f"trial {one.trial}: {each}, mean {one.mean:.4f}")
    what = "the loss" if found[0].measure == EVAL_LOSS else found[0].measure
    return f"With other seeds, {'; '.join(parts)}. A seed changes {what} by {pooled_deviation(found):.4f} (standard deviation)."
