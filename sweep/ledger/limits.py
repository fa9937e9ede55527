"""Define the limits that the ledger decides by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sweep.config.budget_limits import BudgetConfig
from sweep.trials.objectives import EVAL_LOSS

if TYPE_CHECKING:  # a page that shows a sweep plans nothing
    from sweep.plan.sweep_plan import SweepPlan

NO_BUDGET = BudgetConfig()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limit what a sweep may use, and say when a trial is complete.

    num_rungs: reports of a complete trial. max_retries: deaths of a trial's process in a row
    without a new report. report_timeout_s: seconds that a trial may be silent, None for no limit.
    objectives: what a complete trial must have measured. sign: 1 if smaller values of the one that
    decides are better, else -1. grid: tokens seen at each rung, for a budget of tokens; empty if
    they are all the same. elsewhere_s: slot seconds and seconds that the sweep spent outside this
    ledger, which count against its budget.
    """

    num_trials: int
    num_rungs: int
    num_slots: int
    max_retries: int
    report_timeout_s: float | None = None
    budget: BudgetConfig = NO_BUDGET
    objectives: tuple[str, ...] = (EVAL_LOSS,)
    sign: float = 1.0
    grid: tuple[int, ...] = ()
    elsewhere_s: tuple[float, float] = (0.0, 0.0)

    @property
    def token_limit(self) -> int | None:
        """Return how many tokens all trials together may see, or None for no limit."""
        full_trials = self.budget.full_trials
        return None if full_trials is None else round(full_trials * self.tokens_at(self.num_rungs))

    def tokens_at(self, rung: int) -> int:
        """Return the tokens that a trial has seen at a rung; 0 at rung 0."""
        if rung == 0:
            return 0
        return self.grid[rung - 1] if self.grid else rung

    @classmethod
    def of(cls, plan: SweepPlan, **changes: Any) -> Limits:
        """Return the limits of a checked sweep. changes: fields with other values."""
        sweep, cluster = plan.config.sweep, plan.config.cluster
        limits = cls(
            num_trials=sweep.num_trials,
            num_rungs=plan.num_rungs,
            num_slots=plan.slots.num_slots,
            max_retries=cluster.max_retries,
            report_timeout_s=cluster.report_timeout_s,
            budget=plan.config.effective_budget,
            objectives=sweep.objectives,
            sign=plan.config.rule.sign,
            grid=tuple(plan.config.train.report_grid()),
        )
        return replace(limits, **changes)
