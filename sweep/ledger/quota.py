"""How many trials may still be asked for, and why it came to less than was asked for. Plain data and no clock of its own."""

from __future__ import annotations

from dataclasses import dataclass

from sweep.ledger.budget import Budget

MAX_INFEASIBLE = 20  # proposals that do not fit the card, for each trial asked for; then the sweep ends with those it has


@dataclass
class Quota:
    """num_trials: asked for. Of the proposals so far, num_started were started, num_refused did not fit the card; is_used_up: the
    space has no other."""

    num_trials: int
    budget: Budget
    num_started: int = 0
    num_refused: int = 0
    is_used_up: bool = False

    @property
    def may_ask(self) -> bool:
        if self.budget.spent():
            return False
        return self.num_started < self.num_trials and not self.is_used_up and not self._has_given_up

    def shortfall(self, num_stopped: int) -> str | None:
        """Why less was trained than asked for, in one line; None where that is not so, or not yet. num_stopped: trials that the
        budget stopped."""
        started, refused = self.num_started, self.num_refused
        if self.budget.spent():
            line = f"{self.budget.spent()}: {started} of {self.num_trials} trials were started"
            return line + (f", {num_stopped} stopped at a report, to go on with a larger budget" if num_stopped else "")
        if started >= self.num_trials or not (self.is_used_up or self._has_given_up):
            return None
        if self.is_used_up:
            line = f"the space is used up: {started} of {self.num_trials} trials were possible"
            return line + (f", {refused} points do not fit the card" if refused else "")
        line = f"{started} of {self.num_trials} trials were started: after {refused} proposals that do not fit the card"
        return line + " no more are made; the leaderboard says what each needs"

    @property
    def _has_given_up(self) -> bool:
        return self.num_refused >= MAX_INFEASIBLE * self.num_trials
