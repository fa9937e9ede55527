"""What a sweep may use, and when its trials count as done: the numbers that the ledger decides by. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from sweep.config.sweep import BudgetConfig
from sweep.plan.sweep_plan import SweepPlan
from sweep.trials.objectives import EVAL_LOSS

NO_BUDGET = BudgetConfig()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """max_retries: deaths of a trial's process without a new report in between. report_timeout_s: how long a trial may be silent;
    None: for ever. objectives: what must be measured of a trial that is complete."""

    num_trials: int
    num_rungs: int
    num_slots: int
    max_retries: int
    report_timeout_s: float | None = None
    budget: BudgetConfig = NO_BUDGET
    objectives: tuple[str, ...] = (EVAL_LOSS,)

    @classmethod
    def of(cls, plan: SweepPlan) -> Limits:
        """Those of a checked sweep."""
        sweep, cluster = plan.config.sweep, plan.config.cluster
        return cls(
            num_trials=sweep.num_trials,
            num_rungs=plan.num_rungs,
            num_slots=plan.slots.num_slots,
            max_retries=cluster.max_retries,
            report_timeout_s=cluster.report_timeout_s,
            budget=sweep.budget,
            objectives=sweep.objectives,
        )
