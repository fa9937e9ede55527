"""Define the section sweep.budget: what a sweep may spend besides its number of trials."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from engine.config.parsing import StrictModel
from engine.units import counted

MAX_TRIALS = 1_000_000
PositiveFloat = Annotated[float, Field(gt=0.0)]
Hours = Annotated[float, Field(gt=0.0, le=1e6)]


class BudgetConfig(StrictModel):
    """Limit what a sweep may spend, in addition to its number of trials.

    Once a limit is reached, no trial starts, and running trials stop at their next report.
    """

    gpu_hours: Annotated[float, Field(gt=0.0, le=1e9)] | None = Field(
        None, description="hours for which trials hold slots, summed over slots; null: no limit"
    )
    wall_clock_hours: Hours | None = Field(None, description="hours for which the sweep runs; null: no limit")
    target_loss: PositiveFloat | None = Field(None, description="an eval_loss that is good enough to end the sweep; null: none")
    target_metric: Annotated[float, Field(ge=-1e9, le=1e9)] | None = Field(
        None, description="the same of the metric in sweep.objectives; null: none"
    )
    full_trials: Annotated[float, Field(gt=0.0, le=MAX_TRIALS)] | None = Field(
        None,
        description="tokens of all trials together, in units of train.max_tokens; null: no limit, "
        "but for sampler=freeze_thaw a quarter of sweep.num_trials, at least 2",
    )


def describe_budget(limits: BudgetConfig) -> str:
    """Return the limits that are set, for the plan: `4 GPU hours, an eval loss of 1.2`.

    Empty if none is set.
    """
    parts = [
        f"{limits.gpu_hours:g} GPU hours" if limits.gpu_hours is not None else "",
        f"{limits.wall_clock_hours:g} hours" if limits.wall_clock_hours is not None else "",
        f"an eval loss of {limits.target_loss:g}" if limits.target_loss is not None else "",
        f"a metric of {limits.target_metric:g}" if limits.target_metric is not None else "",
        f"the tokens of {counted(limits.full_trials, 'full trial')}" if limits.full_trials is not None else "",
    ]
    return ", ".join(filter(None, parts))
