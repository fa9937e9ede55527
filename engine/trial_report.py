"""Define a trial's report at a rung, the clock of its times, and read a trial's reports.

Importing this module loads no torch, because the driver reads reports too.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.config.metrics_section import EVAL_LOSS
from engine.config.parsing import parse_dataclass
from engine.errors import InputError

REPORTS = "reports.jsonl"
CHECKPOINT, PREVIOUS_CHECKPOINT = "checkpoint", "checkpoint.previous"  # folders that only resume needs
TRAIN, RECORDING, EVALUATION, SAVING = "train", "recording", "eval", "save"
START, MODEL, DATA, ATTACH, WAITING = "start", "model", "data", "attach", "idle"


class PartClock:
    """Split the time of one trial in one process into named parts.

    Exactly one part runs at any moment, so the parts add up to the time since the start.
    """

    def __init__(self, part: str = START, clock: Callable[[], float] = time.perf_counter) -> None:
        """part: the one that runs first. clock: returns seconds."""
        self._part, self._clock = part, clock
        self._since_s = clock()
        self._sums: dict[str, float] = {}
        self._taken: dict[str, float] = {}

    def enter(self, part: str) -> str:
        """Begin another part, and return the one that ran until now."""
        now_s, before = self._clock(), self._part
        self._sums[before] = self._sums.get(before, 0.0) + now_s - self._since_s
        self._part, self._since_s = part, now_s
        return before

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Run a part inside this context, then the one before it again. Do not yield inside it."""
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def seconds(self, *parts: str) -> float:
        """Return the seconds that these parts took so far, together."""
        self.enter(self._part)
        return sum(self._sums.get(part, 0.0) for part in parts)

    def move(self, source: str, target: str, seconds: float) -> None:
        """Count seconds of one part for another, which turned out to be what was done."""
        self.enter(self._part)
        self._sums[source] = self._sums.get(source, 0.0) - seconds
        self._sums[target] = self._sums.get(target, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Return each part's seconds since the last call, or since the start."""
        self.enter(self._part)
        new = {part: sum_s - self._taken.get(part, 0.0) for part, sum_s in self._sums.items()}
        self._taken = dict(self._sums)
        return {part: round(seconds, 6) for part, seconds in new.items() if seconds}


@dataclass(frozen=True, slots=True)
class TrialReport:
    """Record one point of a learning curve. Losses are mean nats per target token.

    rung: index on the tokens-seen grid, from 1. tokens_seen: tokens fed forward so far, at or just
    above the grid point. train_loss: over all target tokens since the previous report. eval_loss:
    on the fixed evaluation set, or the weighted mean of eval_losses, those of several sets by name.
    eval_excess: nats by which the worst of them is above its limit, below 0 if all are within; None
    without limits. best_eval_loss: lowest so far, of those within the limits if there are any;
    `adapter/` in the trial folder is the adapter of that rung, unless a metric chooses it
    (`kept_report`). raw_eval_loss, ema_eval_loss: of the last step's adapter and of the running
    average; eval_loss is the lower one, of those within the limits. None without an average (optim.ema_horizon).

    elapsed_s: seconds inside optimizer steps, without evaluation, over all resumed parts.
    step_time_ms: mean over the steps since the previous report. setup_s: seconds from the call of
    train() to its first step, in this process. model_s, data_s, attach_s: what set-up spent on the
    base model (0 if it was resident), on the data, and on adapter, plan and checkpoint. The rest of
    setup_s went to recordings before the first step. If the caller loads the model on the trial's
    clock, before the call, model_s is that.

    train_s: seconds of steady steps since the previous report. recording_s: seconds of recordings
    in steps and evaluations, and what first steps took beyond steady ones. eval_s, save_s: seconds
    of evaluation and of saves since the previous report, in this process. So save_s counts the save
    of the previous report. These and the parts of set-up are None in reports of older versions.

    predicted_peak_gib: the current plan's prediction, None if there is none. peak_allocated_gib:
    the measured peak of tensors. peak_reserved_gib: that of what the allocator held for them, which
    decides whether memory runs out; None in older reports. num_out_of_memory: how often the engine
    made the plan leaner because memory ran out. micro_batch_size, activation_checkpointing: those
    of the current plan.

    metrics: mean score of each task metric that was measured at this rung. metrics_error: one line
    on those that have none, None if there is nothing to say. metrics_s: seconds for all of them.
    """

    rung: int
    tokens_seen: int
    target_tokens_seen: int
    step: int
    epoch: float
    train_loss: float
    eval_loss: float
    best_eval_loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    step_time_ms: float
    peak_allocated_gib: float
    elapsed_s: float
    num_trainable: int
    predicted_peak_gib: float | None = None
    peak_reserved_gib: float | None = None
    num_out_of_memory: int = 0
    micro_batch_size: int = 1
    activation_checkpointing: str = "false"
    setup_s: float = 0.0
    model_s: float | None = None
    data_s: float | None = None
    attach_s: float | None = None
    train_s: float | None = None
    recording_s: float | None = None
    eval_s: float | None = None
    save_s: float | None = None
    raw_eval_loss: float | None = None
    ema_eval_loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    metrics_error: str | None = None
    metrics_s: float | None = None
    eval_losses: dict[str, float] = field(default_factory=dict)
    eval_excess: float | None = None

    @property
    def over_limits(self) -> float:
        """Return the nats by which the losses are above their limits; 0 if they are within, or there are none."""
        return max(self.eval_excess or 0.0, 0.0)

    @property
    def is_average(self) -> bool:
        """Return True if eval_loss is the running average's."""
        return self.ema_eval_loss is not None and self.eval_loss == self.ema_eval_loss != self.raw_eval_loss

    def cost(self, measure: str, sign: float) -> float | None:
        """Return the measure so that smaller is better, or None if it was not measured here.

        measure: eval_loss or a metric. sign: 1 if smaller values of it are better, else -1.
        """
        value = self.eval_loss if measure == EVAL_LOSS else self.metrics.get(measure)
        return None if value is None else sign * value

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_dict(cls, values: Any) -> TrialReport:
        """Read plain data from JSON. Raises InputError if it is no report.

        Older versions left out the newer keys, and wrote 0 for a missing prediction.
        """
        report = parse_dataclass(cls, values, "report")
        return replace(report, predicted_peak_gib=None) if report.predicted_peak_gib == 0.0 else report


def kept_report(reports: Sequence[TrialReport], measure: str = EVAL_LOSS, sign: float = 1.0) -> TrialReport | None:
    """Return the report whose adapter is kept in `adapter/`: the best one, of equal ones the last.

    Reports within the limits come before those that exceed them, which compare by how far. Reports
    that have the measure come before those that lack it, which compare by eval_loss. Where a metric
    is equal, eval_loss decides. Arguments: see `TrialReport.cost`.
    """

    def order(report: TrialReport) -> tuple[float, ...]:
        cost = report.cost(measure, sign)
        found = (math.inf,) if cost is None else (cost,)
        return (report.over_limits, *found, report.eval_loss, -report.rung)

    return min(reports, key=order, default=None)


def read_reports(trial_folder: Path) -> list[TrialReport]:
    """Read the saved reports, ascending by rung. The list is empty if there are none yet.

    A torn last line is left out. The trial's checkpoint has that report, and the engine writes the
    file again from it. Raises InputError if a whole line is not the report of its rung.
    """
    file = trial_folder / REPORTS
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    if lines and lines[-1]:
        lines.pop()
    return [_report(file, rung, line) for rung, line in enumerate(filter(None, lines), 1)]


def _report(file: Path, rung: int, line: bytes) -> TrialReport:
    fault = f"its rung is not {rung}"
    try:
        report = TrialReport.from_dict(json.loads(line))
        if report.rung == rung:
            return report
    except InputError as error:
        fault = str(error)
    except (ValueError, RecursionError):
        fault = "it is not valid JSON"
    way_out = f"restore the file from a copy; while {CHECKPOINT}/ is there, it can be removed"
    allowed = f"line {rung} must be the report of rung {rung}, but {fault}; {way_out}"
    raise InputError(str(file), line[:80], allowed)
