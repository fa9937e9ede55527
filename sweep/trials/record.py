"""Define a trial's outcome, and the plain record that tracker and leaderboard are made from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from engine.config.metrics_section import EVAL_LOSS, EVERY, PREFERENCE_ACCURACY, sign_of
from engine.config.trial import TrainConfig
from engine.trial_report import TrialReport, kept_report
from sweep.trials.warm_from import WarmFrom


class Outcome(StrEnum):
    """Name the ways in which a trial ends. A RUNNING trial has not ended.

    STOPPED: the sweep's budget was spent, so the trial ended at a report. A resume with a larger
    budget continues it. PAUSED: the trial waits without a slot, and may go on later. PRUNED: a pruner
    or a user has given it up.

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


OVER_LIMITS = 1e6
"""What a pruner compares of a rung above the limits, plus the nats above them. No loss or metric comes near it."""

CONTENDERS = (Outcome.COMPLETE, Outcome.STOPPED, Outcome.PAUSED)
"""The outcomes whose adapter may win: no pruner has judged them hopeless.

All losses are on one evaluation set, so a trial that saw fewer tokens may win too.
"""


GOING_ON = (Outcome.RUNNING, Outcome.STOPPED, Outcome.PAUSED)
"""The outcomes of trials that have not ended: they may go on, and need their checkpoints for it."""


@dataclass(frozen=True)
class TrialRecord:
    """Record one trial as the study and its folder know it.

    number: Optuna's, from 0. params: dotted path -> sampled value or choice name. config: the whole
    TrainConfig, as plain data: thousands of records share the sections that the space leaves alone.
    reports: ascending by rung. started_s, ended_s: Unix seconds. error: one line if it failed.

    predicted_gib: peak predicted before the start. measured_gib: peak when memory ran out. Both are
    None if not known. slot, dead_time_s: those of its newest stay in a slot, see timeline.Span.
    source: the trial of an earlier sweep from which this one was taken over. warm: the adapter that a
    warm clone began with.
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
    warm: WarmFrom | None = None

    @property
    def warm_text(self) -> str:
        """Return ` (warm from trial 3 at 4,130 tokens)` for a warm clone, to stand behind its params."""
        return "" if self.warm is None else f" ({self.warm.text})"

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
    def chosen_by(self) -> str:
        """Return the measure that decides which trial wins: eval_loss or a task metric."""
        return (self.config.get("metrics") or {}).get("choose_by", EVAL_LOSS)

    @property
    def sign(self) -> float:
        """Return 1 if smaller values of what decides are better, else -1."""
        return self._sign(self.chosen_by)

    @cached_property
    def kept(self) -> TrialReport | None:
        """Return the report of the adapter in the folder, or None before the first one."""
        return kept_report(self.reports, self.chosen_by, self.sign)

    @property
    def score(self) -> float | None:
        """Return what decides of the adapter in the folder, where smaller is better: its eval_loss, or a metric turned.

        None if it was not measured.
        """
        return self.cost(self.chosen_by)

    @property
    def eval_loss(self) -> float | None:
        """Return the eval_loss of the adapter in the folder."""
        return self.kept.eval_loss if self.reports else None

    @property
    def eval_losses(self) -> dict[str, float]:
        """Return the losses of the adapter in the folder on each of several evaluation sets."""
        return self.kept.eval_losses if self.reports else {}

    @property
    def excess(self) -> float | None:
        """Return the nats by which the adapter in the folder is above data.eval_limits; None without limits."""
        return self.kept.eval_excess if self.reports else None

    @property
    def keeps_limits(self) -> bool:
        """Return whether the adapter in the folder may win, as far as data.eval_limits decide."""
        return self.excess is None or self.excess <= 0.0

    @property
    def metrics(self) -> dict[str, float]:
        """Return what the adapter in the folder scored by the task metrics."""
        return self.kept.metrics if self.reports else {}

    @property
    def is_of_pairs(self) -> bool:
        """Return whether the trial learnt from pairs: its eval_loss is a mean over pairs, and has no perplexity."""
        return PREFERENCE_ACCURACY in self.metrics

    @property
    def loss_unit(self) -> str:
        """Return the unit of eval_loss in words."""
        return "nats a pair" if self.is_of_pairs else "nats per target token"

    def cost(self, measure: str) -> float | None:
        """Return eval_loss or a metric of the adapter in the folder so that smaller is better, or None."""
        return self.kept.cost(measure, self._sign(measure)) if self.reports else None

    def judged(self, report: TrialReport) -> float:
        """Return what a pruner compares at a rung, where smaller is better.

        It is the metric that decides if every rung measures it, else the loss. Infinity stands for
        a metric that failed at this rung. What exceeds its limits comes after all that keeps to
        them, by how far (Deb, Computer Methods in Applied Mechanics and Engineering 186 (2000) 311).
        """
        if report.over_limits:
            return OVER_LIMITS + report.over_limits
        metrics, name = self.config.get("metrics") or {}, self.chosen_by
        every = metrics.get("at") == EVERY or name == PREFERENCE_ACCURACY
        value = report.cost(name, self.sign) if every else report.eval_loss
        return math.inf if value is None else value

    @property
    def is_unjudged(self) -> bool:
        """Return True if the newest report lacks the metric to compare: a metric's fault costs no trial."""
        return bool(self.reports) and math.isinf(self.judged(self.reports[-1]))

    def _sign(self, measure: str) -> float:
        return sign_of(self.config.get("metrics") or {}, measure)

    def result(self) -> dict[str, Any]:
        """Return the content of result.json."""
        names = ("number", "params", "score", "started_s", "ended_s", "slot", "dead_time_s", "error", "predicted_peak_gib",
                 "peak_allocated_gib")  # fmt: skip
        known = {name: getattr(self, name) for name in names}
        known |= {"metrics": self.metrics} if self.metrics else {}
        known |= {"eval_losses": self.eval_losses} if self.eval_losses else {}
        known |= {"warm": self.warm.to_dict()} if self.warm else {}
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
