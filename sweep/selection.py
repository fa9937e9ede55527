"""Which trial won, and in which order the others stand. Plain data in, plain data out."""

from __future__ import annotations

import math
import statistics

from sweep.outcome import CONTENDERS, Outcome, TrialRecord

TIE = 1e-4  # nats: below what another seed or another GPU changes
RULE = (
    f"lowest eval_loss over the reports of a trial that is COMPLETE, or STOPPED by the budget; within {TIE:g} nats of it, the "
    "fewest trainable parameters, then the lowest trial number"
)


def select_best(records: list[TrialRecord]) -> TrialRecord | None:
    """The winner by RULE; None where no such trial has a finite eval_loss."""
    able = [record for record in records if record.outcome in CONTENDERS and _score(record) < math.inf]
    if not able:
        return None
    limit = min(_score(record) for record in able) + TIE
    return min((record for record in able if _score(record) <= limit), key=lambda record: (num_parameters(record), record.number))


def rank(records: list[TrialRecord]) -> list[TrialRecord]:
    """The winner, the others that could have won by score, PRUNED ones by score, the rest by number, INFEASIBLE ones last."""
    best = select_best(records)
    group = {Outcome.COMPLETE: 1, Outcome.STOPPED: 1, Outcome.PRUNED: 2, Outcome.INFEASIBLE: 4}

    def key(record: TrialRecord) -> tuple:
        place = 0 if record is best else group.get(record.outcome, 3)
        return (place, _score(record) if place < 3 else 0.0, num_parameters(record), record.number)

    return sorted(records, key=key)


def num_parameters(record: TrialRecord) -> int:
    return record.reports[-1]["num_trainable"] if record.reports else 0


def median_speed(record: TrialRecord) -> float | None:
    """Median tokens per second over the reports: the first one holds warm-up and compilation."""
    return statistics.median(report["tokens_per_second"] for report in record.reports) if record.reports else None


def _score(record: TrialRecord) -> float:
    """record.score, infinite where there is none or it is not finite."""
    score = record.score
    return score if score is not None and math.isfinite(score) else math.inf
