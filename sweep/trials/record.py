"""Define a trial's outcome, and the plain record that tracker and leaderboard are made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from engine.config.trial import TrainConfig
from engine.trial_report import TrialReport


class Outcome(StrEnum):
    """Name the ways in which a trial ends. A RUNNING trial has not ended.

    STOPPED: the sweep's budget was spent, so the trial ended at a report. A resume with a larger
    budget continues it. PAUSED: the trial waits at a rung without a slot, and may go on later.

    INFEASIBLE: the trial is predicted not to fit the card. It never started, and does not count as
    one of the sweep's trials. OUT_OF_MEMORY: the trial started, and not even the leanest plan fits.
    LOST: its process died too often.
    """

    RUNNING = "RUNNING"
    COMPLETE = "COMPLETE"
    STOPPED = "STOPPED"
    PAUSED = "PAUSED"
    PRUNED = "PRUNED"
    INFEASIBLE = "INFEASIBLE"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    DIVERGED = "DIVERGED"
    LOST = "LOST"
    FAILED = "FAILED"


CONTENDERS = (Outcome.COMPLETE, Outcome.STOPPED, Outcome.PAUSED)
"""The outcomes whose adapter may win: no pruner has judged them hopeless.

All losses are on one evaluation set, so a trial that saw fewer tokens may win too.
"""


GOING_ON = (Outcome.RUNNING, Outcome.STOPPED, Outcome.PAUSED)
"""The outcomes of trials that may go on, and need their checkpoints for it."""


@dataclass(frozen=True)
class TrialRecord:
    """Record one trial as the study and its folder know it.

    number: Optuna's, from 0. params: dotted path -> sampled value or choice name. config: the whole
    TrainConfig, as plain data: thousands of records share the sections that the space leaves alone.
    reports: ascending by rung. started_s, ended_s: Unix seconds. error: one line if it failed.

    predicted_gib: peak predicted before the start. measured_gib: peak when memory ran out. Both are
    None if not known. slot, dead_time_s: those of its newest stay in a slot, see timeline.Span.
    source: the trial of an earlier sweep from which this one was taken over.
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
        """Return the predicted peak of the trial's last plan, in GiB.

        Before the first report it is the sweep's own prediction. None: there is no prediction.
        """
        reported = self.reports[-1].predicted_peak_gib if self.reports else None
        return self.predicted_gib if reported is None else reported

    @property
    def peak_allocated_gib(self) -> float | None:
        """Return the highest measured peak in GiB, or None if nothing was measured."""
        peaks = [report.peak_allocated_gib for report in self.reports]
        return max(peaks if self.measured_gib is None else [*peaks, self.measured_gib], default=None)

    @property
    def score(self) -> float | None:
        """Return the lowest eval_loss of the reports: that of the adapter in the folder."""
        return min((report.eval_loss for report in self.reports), default=None)

    def result(self) -> dict[str, Any]:
        """Return the content of result.json."""
        names = ("number", "params", "score", "started_s", "ended_s", "slot", "dead_time_s", "error", "predicted_peak_gib",
                 "peak_allocated_gib")  # fmt: skip
        known = {name: getattr(self, name) for name in names}
        return {**known, "outcome": str(self.outcome), "num_reports": len(self.reports)}


@dataclass(frozen=True)
class Proposal:
    """Hold a trial that the study proposes.

    The study records it as RUNNING, or with a refusal as INFEASIBLE.

    params: dotted path -> sampled value or choice name. refusal: the reason in one line. num_heard:
    how many of its reports the sweep has, if it continues.
    """

    number: int
    params: dict[str, Any]
    config: TrainConfig
    refusal: str | None = None
    num_heard: int = 0
