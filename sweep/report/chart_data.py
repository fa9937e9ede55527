"""Say what charts show: their titles, colours and points. No plotly, so that a page can show these before it is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sweep.trials.objectives import EVAL_LOSS
from sweep.trials.record import Outcome, TrialRecord

CURVES, PARETO, MEMORY, SLOTS = "Learning curves", "Loss, memory and time", "Predicted and measured memory", "Slots"
IMPORTANCE, PARALLEL, SLICES = "Parameter importance", "Parallel coordinates", "Slices"
HOURS = "Where the hours went"
COLOURS = {
    Outcome.COMPLETE: "#2166ac",
    Outcome.STOPPED: "#66a5cf",
    Outcome.PAUSED: "#a6761d",
    Outcome.RUNNING: "#1b9e77",
    Outcome.PRUNED: "#8a8a8a",
    Outcome.INFEASIBLE: "#c9c9c9",
    Outcome.OUT_OF_MEMORY: "#d95f02",
    Outcome.DIVERGED: "#c51b7d",
    Outcome.LOST: "#7b3294",
    Outcome.FAILED: "#b2182b",
}


def curves_by(records: Sequence[TrialRecord]) -> str:
    """Return what learning curves show: the metric that decides once a trial has one, else eval_loss."""
    name = records[0].chosen_by if records else EVAL_LOSS
    return name if any(name in report.metrics for record in records for report in record.reports) else EVAL_LOSS


def metric_curve(record: TrialRecord, name: str) -> list[tuple[int, float]]:
    """Return tokens seen and eval_loss or a metric at each rung that measured it."""
    points = [(report.tokens_seen, report.cost(name, 1.0)) for report in record.reports]
    return [(tokens, value) for tokens, value in points if value is not None]


def usual_range(losses: list[float], margin: float = 0.05) -> list[float] | None:
    """Return an axis range without the losses of a few diverged trials.

    Those would press all other lines flat; a double click shows everything.
    """
    finite = sorted(loss for loss in losses if math.isfinite(loss))
    if len(finite) < 4:
        return None
    low, usual = finite[0], finite[int(0.9 * (len(finite) - 1))]
    top = min(finite[-1], usual + (usual - low))
    room = margin * (top - low) or (0.01 if margin else 0.0)
    return [low - room, top + room]
