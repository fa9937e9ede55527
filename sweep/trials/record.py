"""How a trial ended, and the plain record of it that every projection (MLflow, leaderboard) is made from. No torch, no ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from engine.config.trial import TrainConfig
from engine.trial_report import TrialReport


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

    number: Optuna's, from 0. params: dotted path -> sampled value or choice name. config: the whole
    TrainConfig, as plain data: thousands of records share the sections that the space leaves alone.
    reports: ascending by rung. started_s / ended_s: Unix seconds. error: one line where it failed.
    predicted_gib: peak predicted before the start. measured_gib: peak where memory ran out; None
    where not known. slot, dead_time_s: of its newest stay in a slot, see timeline.Span. source: the
    earlier sweep's trial it was taken over from.
    """

    number: int
    params: dict[str, Any]
    config: dict[str, Any]
    outcome: Outcome
    folder: str
    reports: list[TrialReport] = field(default_factory=list)
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
        reported = self.reports[-1].predicted_peak_gib if self.reports else None
        return self.predicted_gib if reported is None else reported

    @property
    def peak_allocated_gib(self) -> float | None:
        """Highest measured; None where nothing was."""
        peaks = [report.peak_allocated_gib for report in self.reports]
        return max(peaks if self.measured_gib is None else [*peaks, self.measured_gib], default=None)

    @property
    def score(self) -> float | None:
        """Lowest eval_loss over the trial's reports: that of the adapter in its folder."""
        return min((report.eval_loss for report in self.reports), default=None)

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
