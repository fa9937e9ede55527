"""How a trial ended, and the plain record of it that every projection (MLflow, leaderboard) is made from. No torch, no ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from engine.config.trial import TrainConfig


class Outcome(StrEnum):
    """The ways a trial ends; RUNNING is the one that has not.

    STOPPED: the sweep's budget was spent, so it ended at a report; a resume with a larger budget goes on with it. INFEASIBLE:
    predicted not to fit the card, so it was never started and counts for no trial of the sweep. OUT_OF_MEMORY: it was started,
    and not even the leanest way to compute it fits. LOST: its process died too often.
    """

    RUNNING = "RUNNING"
    COMPLETE = "COMPLETE"
    STOPPED = "STOPPED"
    PRUNED = "PRUNED"
    INFEASIBLE = "INFEASIBLE"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    DIVERGED = "DIVERGED"
    LOST = "LOST"
    FAILED = "FAILED"


CONTENDERS = (Outcome.COMPLETE, Outcome.STOPPED)
"""Whose adapter can be chosen: nobody judged it hopeless. All losses are on one evaluation set, so fewer tokens are no bar."""


@dataclass(frozen=True)
class TrialRecord:
    """One trial as the study and its folder know it.

    number: Optuna's, from 0; params: dotted path -> sampled value or choice name; config: the whole TrainConfig as plain data;
    reports: engine Report dicts, ascending by rung; started_s / ended_s: Unix seconds; error: one line where it failed.
    predicted_gib: peak predicted before the start; measured_gib: peak where memory ran out; None where not known.
    slot, dead_time_s: of its newest stay in a slot, see timeline.Span. source: the earlier sweep's trial it was taken over from.
    """

    number: int
    params: dict[str, Any]
    config: dict[str, Any]
    outcome: Outcome
    folder: str
    reports: list[dict[str, Any]] = field(default_factory=list)
    started_s: float | None = None
    ended_s: float | None = None
    error: str | None = None
    predicted_gib: float | None = None
    measured_gib: float | None = None
    slot: str | None = None
    dead_time_s: float | None = None
    source: str | None = None

    @property
    def predicted_peak_gib(self) -> float | None:
        """Of the plan the trial was last computed by; the sweep's own where it has not reported. None where nobody predicted."""
        reported = self.reports[-1].get("predicted_peak_gib") if self.reports else None
        return reported or self.predicted_gib  # a report without a prediction says 0

    @property
    def peak_allocated_gib(self) -> float | None:
        """Highest measured; None where nothing was."""
        peaks = [report.get("peak_allocated_gib") for report in self.reports] + [self.measured_gib]
        return max((peak for peak in peaks if peak is not None), default=None)

    @property
    def score(self) -> float | None:
        """Lowest eval_loss over the trial's reports: that of the adapter in its folder."""
        losses = [report["eval_loss"] for report in self.reports]
        return min(losses) if losses else None

    def result(self) -> dict[str, Any]:
        """What result.json says of it."""
        names = ("number", "params", "score", "started_s", "ended_s", "slot", "dead_time_s", "error", "predicted_peak_gib",
                 "peak_allocated_gib")  # fmt: skip
        known = {name: getattr(self, name) for name in names}
        return {**known, "outcome": str(self.outcome), "num_reports": len(self.reports)}


@dataclass(frozen=True)
class Proposal:
    """A trial that is in the study: as RUNNING, or as INFEASIBLE where there is a refusal, its reason in one line.

    params: dotted path -> sampled value or choice name. num_heard: its reports that the sweep has, where it goes on.
    """

    number: int
    params: dict[str, Any]
    config: TrainConfig
    refusal: str | None = None
    num_heard: int = 0
