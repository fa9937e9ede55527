"""A trial's report at a rung, with units, and the file that keeps all of them. No torch: the driver reads both too."""

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
    """One point of a learning curve. Losses are mean nats per target token.

    rung: index on the tokens-seen grid, from 1. tokens_seen: tokens fed forward so far (at or just
    above the grid point). train_loss: over all target tokens since the previous report. eval_loss:
    on the fixed evaluation set. best_eval_loss: lowest so far; `adapter/` in the trial folder is the
    adapter of that rung. elapsed_s: seconds inside optimizer steps, evaluation left out, resumed
    parts counted in. step_time_ms: mean over the steps since the previous report.
    predicted_peak_gib: of the plan in force, None where there is no prediction; peak_allocated_gib:
    measured. num_out_of_memory: times the plan was made leaner because memory ran out.
    micro_batch_size, activation_checkpointing: of the plan in force. setup_s: from the call of
    train() to its first step, in this process.
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
        """Plain data for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_dict(cls, values: Any) -> TrialReport:
        """Read plain data from JSON, of older versions too. InputError where it is no report.

        Older versions left out the newer keys, and wrote a prediction of 0 where there was none.
        """
        report = parse_dataclass(cls, values, "report")
        return replace(report, predicted_peak_gib=None) if report.predicted_peak_gib == 0.0 else report


def read_reports(trial_folder: Path) -> list[TrialReport]:
    """Read the saved reports, ascending by rung; empty where there are none yet.

    A torn last line is left out: the trial's checkpoint has that report and writes the file again.
    InputError where a whole line is not the report of its rung.
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
    allowed = f"line {rung} must be the report of rung {rung}, but {fault}; remove the file: the checkpoint has all"
    raise InputError(str(file), line[:80], allowed)
