"""Count how many trials the sweep may still ask for, and say why fewer ran than asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from engine.units import counted
from sweep.ledger.budget import Budget
from sweep.trials.record import Outcome, TrialRecord

# for each trial asked for, so many proposals may not fit the card; then the sweep asks no more
MAX_INFEASIBLE = 20
UNUSED = "what is left of sweep.budget.full_trials is too little for another rung that is worth it"


@dataclass
class Quota:
    """Count the proposals so far.

    num_trials: trials that the user asked for. num_started: proposals that were started.
    num_refused: proposals that do not fit the card. is_used_up: the space has no other point.
    is_closed: the user asks for no more trials.
    """

    num_trials: int
    budget: Budget
    num_started: int = 0
    num_refused: int = 0
    is_used_up: bool = False
    is_closed: bool = False

    @classmethod
    def begun(cls, num_trials: int, budget: Budget, records: Iterable[TrialRecord]) -> Quota:
        """Return the quota of a sweep that has these trials. Those of earlier sweeps do not count."""
        outcomes = [record.outcome for record in records if record.source is None]
        num_refused = outcomes.count(Outcome.INFEASIBLE)
        return cls(num_trials, budget, len(outcomes) - num_refused, num_refused)

    @property
    def may_ask(self) -> bool:
        if self.budget.spent() or self.is_closed:
            return False
        return self.num_started < self.num_trials and not self.is_used_up and not self._has_given_up

    def shortfall(self, outcomes: Mapping[Outcome, int]) -> str | None:
        """Return in one line why fewer trials ran than asked for.

        Returns None if that is not so, or not yet known. outcomes: how many trials that have not
        ended have each outcome.
        """
        started, refused = self.num_started, self.num_refused
        do_not = f"{'does' if refused == 1 else 'do'} not fit the card"
        trials = f"{counted(self.num_trials, 'trial')} {'was' if self.num_trials == 1 else 'were'}"
        reason = self.budget.spent() or (UNUSED if outcomes.get(Outcome.PAUSED) else None)
        if reason:
            line = f"{reason}: {started} of {trials} started"
            left = {"stopped at a report": outcomes.get(Outcome.STOPPED), "paused": outcomes.get(Outcome.PAUSED)}
            waiting = [f"{count} {how}" for how, count in left.items() if count]
            return line + (f", {', '.join(waiting)}; a larger budget continues them" if waiting else "")
        if started >= self.num_trials or not (self.is_used_up or self._has_given_up):
            return None
        if self.is_used_up:
            line = f"the space is used up: {started} of {trials} possible"
            return line + (f", {counted(refused, 'point')} {do_not}" if refused else "")
        line = f"{started} of {trials} started: after {counted(refused, 'proposal')} that {do_not}"
        return line + " the sweep asks for no more; the leaderboard says what each needs"

    @property
    def _has_given_up(self) -> bool:
        return self.num_refused >= MAX_INFEASIBLE * self.num_trials
