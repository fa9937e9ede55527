"""How a trial ended, and the plain record of it that every projection (MLflow, leaderboard) is made from. No torch, no ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from engine.config import TrainConfig


class Outcome(StrEnum):
    """The ways a trial ends; RUNNING is the one that has not."""

    RUNNING = "RUNNING"
    COMPLETE = "COMPLETE"
    PRUNED = "PRUNED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    DIVERGED = "DIVERGED"
    LOST = "LOST"
    FAILED = "FAILED"


@dataclass(frozen=True)
class TrialRecord:
    """One trial as the study and its folder know it.

    number: Optuna's, from 0; params: dotted path -> sampled value or choice name; config: the whole TrainConfig as plain data;
    reports: engine Report dicts, ascending by rung; started_s / ended_s: Unix seconds; error: one line where it failed.
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

    @property
    def score(self) -> float | None:
        """Lowest eval_loss over the trial's reports: that of the adapter in its folder."""
        losses = [report["eval_loss"] for report in self.reports]
        return min(losses) if losses else None


@dataclass(frozen=True)
class Proposal:
    """A trial to run: it is in the study as RUNNING. params: dotted path -> sampled value or choice name."""

    number: int
    params: dict[str, Any]
    config: TrainConfig
