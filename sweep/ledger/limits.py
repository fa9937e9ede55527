"""Define the limits that the ledger decides by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sweep.config.sweep import BudgetConfig
from sweep.plan.sweep_plan import SweepPlan
from sweep.trials.objectives import EVAL_LOSS

NO_BUDGET = BudgetConfig()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limit what a sweep may use, and say when a trial is complete.

    num_rungs: reports of a complete trial. max_retries: deaths of a trial's process in a row
    without a new report. report_timeout_s: seconds that a trial may be silent, None for no limit.
    objectives: what a complete trial must have measured. elsewhere_s: slot seconds and seconds that
    the sweep spent outside this ledger, which count against its budget.
    """

    num_trials: int
    num_rungs: int
    num_slots: int
    max_retries: int
    report_timeout_s: float | None = None
    budget: BudgetConfig = NO_BUDGET
    objectives: tuple[str, ...] = (EVAL_LOSS,)
    elsewhere_s: tuple[float, float] = (0.0, 0.0)

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
            budget=sweep.budget,
            objectives=sweep.objectives,
        )
        return replace(limits, **changes)
