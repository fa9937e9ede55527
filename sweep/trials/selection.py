"""Choose the winning trial and rank the others."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from engine.units import counted
from sweep.trials.objectives import EVAL_LOSS, MEASURES, measured, pareto_front
from sweep.trials.paired import LEVEL_TEXT, Contest
from sweep.trials.record import CONTENDERS, Outcome, TrialRecord

TIE = 1e-4  # nats; another seed or another GPU changes more


@dataclass(frozen=True)
class Rule:
    """Choose the winner.

    objectives: those of the study. chosen_by: the one that decides first, eval_loss or a task
    metric. sign: 1 if smaller values of it are better, else -1. within: nats of eval_loss, or units
    of the metric, that the winner may give up for the other objectives. tie_within: the same for a
    smaller adapter, if the evaluation samples cannot tell them apart. contest: who can be told
    apart; None: nobody was compared. is_limited: whether the sweep has data.eval_limits.
    """

    objectives: tuple[str, ...] = (EVAL_LOSS,)
    within: float = 0.0
    tie_within: float = 0.0
    contest: Contest | None = None
    chosen_by: str = EVAL_LOSS
    sign: float = 1.0
    is_limited: bool = False

    @property
    def others(self) -> tuple[str, ...]:
        return tuple(name for name in self.objectives if name != self.chosen_by) if self.within > TIE else ()

    @property
    def text(self) -> str:
        others = [f"the {'lowest' if name in MEASURES else 'best'} {name}" for name in self.others]
        order = [*others, "the fewest trainable parameters", self.best_text]
        return (
            f"{self.best_text.removeprefix('the ')} over the reports of a trial that is COMPLETE, STOPPED by the budget or "
            f"PAUSED{' and keeps to data.eval_limits' if self.is_limited else ''}; "
            f"within {max(self.within, TIE):g}{self._unit} of it{self._tie_text}, {', then '.join(order)}, "
            f"where {TIE:g}{self._unit} count as equal and the lower {self._last_text} wins"
        )

    @property
    def best_text(self) -> str:
        """Return `the lowest eval_loss`, or the same of the metric that decides."""
        return f"the {'lowest' if self.sign > 0 else 'highest'} {self.chosen_by}"

    @property
    def _unit(self) -> str:
        return " nats" if self.chosen_by == EVAL_LOSS else ""

    @property
    def _last_text(self) -> str:
        return "trial number" if self.chosen_by == EVAL_LOSS else "eval_loss"

    @property
    def _tie_text(self) -> str:
        """Return the clause about ties, if some may decide."""
        contest = self.contest
        if contest is None or not contest.differences or self.tie_within <= max(self.within, TIE):
            return ""
        return (
            f", or within {self.tie_within:g}{self._unit} and not told apart from it by the same "
            f"{counted(contest.num_samples, 'evaluation sample')} (paired t test, {LEVEL_TEXT}, "
            f"{counted(len(contest.differences), 'comparison')})"
        )

    def contenders(self, records: list[TrialRecord]) -> list[TrialRecord]:
        """Return the trials that may win.

        Trials of earlier sweeps never do: their adapters are not in this sweep's folder. Nor do those
        above data.eval_limits.
        """
        able = [r for r in records if r.outcome in CONTENDERS and r.source is None and _score(r) < math.inf]
        return [record for record in able if record.keeps_limits]

    def best(self, records: list[TrialRecord]) -> TrialRecord | None:
        """Return the winner, or None if no trial that may win has a finite score."""
        able = self.contenders(records)
        if not able:
            return None
        near = self._near(able)
        decisive = {record.number: self._measured(record) for record in near}
        least = min(decisive.values())
        alike = [record for record in near if decisive[record.number] == least]
        limit = min(map(_score, alike)) + TIE
        return min((record for record in alike if _score(record) <= limit), key=self._last)

    def rank(self, records: list[TrialRecord]) -> list[TrialRecord]:
        """Return the records with the winner first, then COMPLETE, STOPPED and PAUSED trials by score.

        Those above data.eval_limits follow, PRUNED trials by score, and then those of earlier sweeps by
        score. The rest come last
        in order of size and number, INFEASIBLE ones at the very end.
        """
        best = self.best(records)
        group = {**dict.fromkeys(CONTENDERS, 1), Outcome.PRUNED: 2, Outcome.INFEASIBLE: 5}

        def key(record: TrialRecord) -> tuple:
            usual = 3 if record.source is not None else group.get(record.outcome, 4)
            usual = 1.5 if usual == 1 and not record.keeps_limits else usual
            place = 0 if record is best else usual
            return (place, _score(record) if place < 4 else 0.0, num_parameters(record), record.number)

        return sorted(records, key=key)

    def front(self, records: list[TrialRecord]) -> list[TrialRecord]:
        """Return the Pareto front, empty for one objective: it would be the best trial alone."""
        return pareto_front(records, self.objectives) if len(self.objectives) > 1 else []

    def _near(self, able: list[TrialRecord]) -> list[TrialRecord]:
        """Return the contenders whose loss counts as good as the lowest.

        A contest that was held against another trial than the lowest decides nothing.
        """
        first = lowest(able)
        limit, tied = _score(first) + max(self.within, TIE), ()
        if self.contest is not None and self.contest.lowest == first.number:
            tied = self.contest.tied
        wide = _score(first) + self.tie_within
        return [record for record in able if _score(record) <= (wide if record.number in tied and wide > limit else limit)]

    def _last(self, record: TrialRecord) -> tuple[float, ...]:
        """Return what decides at last: the lower loss if a metric is equal, then the lower number."""
        return (record.number,) if self.chosen_by == EVAL_LOSS else (record.eval_loss, record.number)

    def _measured(self, record: TrialRecord) -> tuple:
        """Return what decides among trials whose loss counts as equal.

        A stopped trial comes after the others: what it has spent says little.
        """
        values = [measured(record, name) for name in self.others]
        other = [math.inf if value is None or record.outcome is Outcome.STOPPED else value for value in values]
        return (*other, num_parameters(record))


def lowest(able: list[TrialRecord]) -> TrialRecord:
    """Return the contender with the lowest loss, or the best metric; of equal ones the first."""
    return min(able, key=lambda record: (_score(record), record.number))


def num_parameters(record: TrialRecord) -> int:
    return record.reports[-1].num_trainable if record.reports else 0


def median_speed(record: TrialRecord) -> float | None:
    """Return the median tokens per second: the first report includes warm-up and compilation."""
    return statistics.median(report.tokens_per_second for report in record.reports) if record.reports else None


def _score(record: TrialRecord) -> float:
    """Return record.score, or infinity if there is none or it is not finite."""
    score = record.score
    return score if score is not None and math.isfinite(score) else math.inf
