"""Define a trial's report at a rung, and read the file that holds a trial's reports.

Importing this module loads no torch, because the driver reads reports too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config.parsing import parse_dataclass
from engine.errors import InputError

REPORTS = "reports.jsonl"


@dataclass(frozen=True, slots=True)
class TrialReport:
    """Record one point of a learning curve. Losses are mean nats per target token.

    rung: index on the tokens-seen grid, from 1. tokens_seen: tokens fed forward so far, at or just
    above the grid point. train_loss: over all target tokens since the previous report. eval_loss:
    on the fixed evaluation set. best_eval_loss: lowest so far; `adapter/` in the trial folder is
    the adapter of that rung.

    elapsed_s: seconds inside optimizer steps, without evaluation, over all resumed parts.
    step_time_ms: mean over the steps since the previous report. setup_s: seconds from the call of
    train() to its first step, in this process.

    predicted_peak_gib: the current plan's prediction, None if there is none. peak_allocated_gib:
    the measured peak. num_out_of_memory: how often the engine made the plan leaner because memory
    ran out. micro_batch_size, activation_checkpointing: those of the current plan.
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
    num_out_of_memory: int = 0
    micro_batch_size: int = 1
    activation_checkpointing: str = "false"
    setup_s: float = 0.0

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
    allowed = f"line {rung} must be the report of rung {rung}, but {fault}; remove the file: the checkpoint has all reports"
    raise InputError(str(file), line[:80], allowed)
