"""Choose the winning trial and rank the others."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from sweep.trials.objectives import EVAL_LOSS, MEASURES, pareto_front
from sweep.trials.record import CONTENDERS, Outcome, TrialRecord

TIE = 1e-4  # nats; another seed or another GPU changes more


@dataclass(frozen=True)
class Rule:
    """Choose the winner.

    objectives: those of the study. within: nats of eval_loss that the winner may give up for the
    other objectives.
    """

    objectives: tuple[str, ...] = (EVAL_LOSS,)
    within: float = 0.0

    @property
    def others(self) -> tuple[str, ...]:
        return tuple(name for name in self.objectives if name != EVAL_LOSS) if self.within > TIE else ()

    @property
    def text(self) -> str:
        order = [f"the lowest {name}" for name in self.others] + ["the fewest trainable parameters", "the lowest trial number"]
        return (
            "lowest eval_loss over the reports of a trial that is COMPLETE, STOPPED by the budget or PAUSED; "
            f"within {max(self.within, TIE):g} nats of it, {', then '.join(order)}"
        )

    def best(self, records: list[TrialRecord]) -> TrialRecord | None:
        """Return the winner, or None if no trial that may win has a finite eval_loss.

        Trials of earlier sweeps never win: their adapters are not in this sweep's folder.
        """
        able = [r for r in records if r.outcome in CONTENDERS and r.source is None and _score(r) < math.inf]
        if not able:
            return None
        limit = min(map(_score, able)) + max(self.within, TIE)
        return min((record for record in able if _score(record) <= limit), key=self._order)

    def rank(self, records: list[TrialRecord]) -> list[TrialRecord]:
        """Return the records with the winner first, then COMPLETE, STOPPED and PAUSED trials by score.

        PRUNED trials by score follow, and then those of earlier sweeps by score. The rest come last
        in order of size and number, INFEASIBLE ones at the very end.
        """
        best = self.best(records)
        group = {**dict.fromkeys(CONTENDERS, 1), Outcome.PRUNED: 2, Outcome.INFEASIBLE: 5}

        def key(record: TrialRecord) -> tuple:
            usual = 3 if record.source is not None else group.get(record.outcome, 4)
            place = 0 if record is best else usual
            return (place, _score(record) if place < 4 else 0.0, num_parameters(record), record.number)

        return sorted(records, key=key)

    def front(self, records: list[TrialRecord]) -> list[TrialRecord]:
        """Return the Pareto front, empty for one objective: it would be the best trial alone."""
        return pareto_front(records, self.objectives) if len(self.objectives) > 1 else []

    def _order(self, record: TrialRecord) -> tuple:
        """Return the sort key among trials of nearly equal loss.

        A stopped trial comes after the others: what it has spent says little.
        """
        measured = [MEASURES[name](record) for name in self.others]
        other = [math.inf if value is None or record.outcome is Outcome.STOPPED else value for value in measured]
        return (*other, num_parameters(record), record.number)


def num_parameters(record: TrialRecord) -> int:
    return record.reports[-1].num_trainable if record.reports else 0


def median_speed(record: TrialRecord) -> float | None:
    """Return the median tokens per second: the first report includes warm-up and compilation."""
    return statistics.median(report.tokens_per_second for report in record.reports) if record.reports else None


def _score(record: TrialRecord) -> float:
    """Return record.score, or infinity if there is none or it is not finite."""
    score = record.score
    return score if score is not None and math.isfinite(score) else math.inf
