"""Write TensorBoard event files: one folder for each trial, with its losses by tokens seen.

They are a projection of reports.jsonl, written from the start again by each session, so a resume
doubles nothing. tensorboardX, which Ray Tune needs too, writes them in a thread of its own.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.errors import InputError, first_line
from sweep.config.sweep import SweepConfig
from sweep.tracking.mlflow_names import METRICS
from sweep.trials.record import Outcome, TrialRecord

FOLDER = "tensorboard"
PACKAGE = "tensorboardX"
SCALARS = (
    "eval_loss", "best_eval_loss", "train_loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_allocated_gib",
)  # fmt: skip


class EventFiles:
    """Write each trial's reports, and at its end its parameters with its best loss. It listens to the ledger.

    A disk that takes no files ends this, with a line, and not the sweep.
    """

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        """folder: that of the sweep. note: shows a line to the user."""
        self._folder, self._note = folder / FOLDER, note
        self._writers: dict[int, Any] = {}
        self._written: dict[int, int] = {}
        self._is_off = False

    def on_trial_updated(self, record: TrialRecord) -> None:
        """Write the reports that are new. A trial without any has no folder."""
        if self._is_off or record.source is not None or not record.reports:
            return
        try:
            self._write(record)
        except Exception as error:
            self._is_off = True
            self._note(f"WARNING: TensorBoard's files are not written from now on ({first_line(error)}); a resume writes them")

    def _write(self, record: TrialRecord) -> None:
        number, name = record.number, f"{record.number:04d}"
        if number not in self._written:
            shutil.rmtree(self._folder / name, ignore_errors=True)  # of an earlier session
            self._written[number] = 0
        if number not in self._writers:
            from tensorboardX import SummaryWriter  # loads protobuf

            # a trial that goes on within a second would replace its first file, whose name is a time
            suffix = f".{self._written[number]}"
            self._writers[number] = SummaryWriter(str(self._folder / name), filename_suffix=suffix)
        writer = self._writers[number]
        for report in record.reports[self._written[number] :]:
            at_s = (record.started_s or 0.0) + report.elapsed_s
            values = {METRICS[field]: getattr(report, field) for field in SCALARS}
            for metric, value in values.items():
                if value is not None:
                    writer.add_scalar(metric, value, report.tokens_seen, walltime=at_s)
        self._written[number] = len(record.reports)
        if record.outcome is not Outcome.RUNNING:
            params = {path: value if isinstance(value, int | float) else str(value) for path, value in record.params.items()}
            writer.add_hparams({**params, "outcome": str(record.outcome)}, {"hparam/best_eval_loss": record.score}, name="params")
            self._writers.pop(number).close()
        else:
            writer.flush()


def check_event_files(wanted: bool) -> None:
    """Raise InputError if event files are wanted and cannot be written here."""
    if wanted and importlib.util.find_spec(PACKAGE) is None:
        raise InputError("tracking.tensorboard", True, f"needs the package {PACKAGE}: pip install {PACKAGE}, or set it to false")


def make_event_files(config: SweepConfig, folder: Path, note: Callable[[str], None]) -> EventFiles | None:
    """Return what writes the event files, None if the config asks for none."""
    return EventFiles(folder, note) if config.tracking.tensorboard else None
