"""Save a trial: its checkpoint, its reports, and the adapter of its best rung.

Tensors are most of the work: copies from the device, digests and flushed files. A thread does it
beside the evaluation, which changes neither adapter nor optimizer. What depends on the evaluation
follows when both have ended: the adapter for users (the checkpoint's own file, linked), the state
with the report, and the line in `reports.jsonl`. A report is therefore durable before anyone hears
of it. A fault of the thread is raised where its files are asked for.
"""

from __future__ import annotations

import functools
import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch

from engine.adapter.lora import LoraLinear
from engine.adapter.peft_files import CONFIG, WEIGHTS, export_adapter
from engine.config.trial import TrainConfig
from engine.model.base import Base
from engine.system.files import share_file, write_text
from engine.training import checkpoint
from engine.training.checkpoint import Pace, Progress
from engine.trial_report import REPORTS, SAVING, PartClock, TrialReport


class TrialFiles:
    """Write the files of one trial. Close it before anything changes adapter or optimizer from outside."""

    def __init__(
        self,
        trial_folder: Path,
        config: TrainConfig,
        base: Base,
        layers: dict[str, LoraLinear],
        optimizer: torch.optim.Optimizer,
        pace: Pace,
        parts: PartClock,
    ) -> None:
        self.folder, self._config, self._base, self._layers = trial_folder, config, base, layers
        self._optimizer, self._pace, self._parts = optimizer, pace, parts
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self._staged: Future[tuple[dict[str, str], float]] | None = None
        self._has_export = False
        self.saved_step = 0

    def is_due(self) -> bool:
        """Return True if it is time for a save between two reports."""
        return self._pace.is_due()

    def begin(self) -> None:
        """Begin to write the tensors as they are now. The device must have finished its steps.

        Until the next save they must not change.
        """
        state = checkpoint.state_of(self._optimizer)
        self._staged = self._thread.submit(_stage, self.folder, self._layers, state, self._base.device)

    def save(self, progress: Progress) -> None:
        """Write the checkpoint of this moment, from the tensors that `begin` had written if it was called."""
        with self._parts.part(SAVING):
            self._place(progress, *self._written())

    def report(self, progress: Progress, report: TrialReport) -> None:
        """Write the adapter if its rung is the best, the checkpoint, and all reports: the last one is `report`."""
        with self._parts.part(SAVING):
            digests, staging_s = self._written()
            if report.eval_loss == report.best_eval_loss:
                self._export(checkpoint.staged_adapter(self.folder))
            self._place(progress, digests, staging_s)
            self.write_reports(progress)

    def num_reported(self) -> int:
        """Return the number of reports in the file."""
        file = self.folder / REPORTS
        return file.read_bytes().count(b"\n") if file.is_file() else 0

    def write_reports(self, progress: Progress) -> None:
        """Replace the file of reports by those of the progress."""
        lines = [json.dumps(report.to_dict(), sort_keys=True) + "\n" for report in progress.reports]
        write_text(self.folder / REPORTS, "".join(lines))

    def finish(self) -> None:
        """Delete what a complete trial needs no more, until `close` at the latest."""
        self._thread.submit(checkpoint.drop_previous, self.folder)

    def close(self) -> None:
        """Wait for the thread, and drop tensors that no save has asked for."""
        self._thread.shutdown()
        if self._staged is not None:
            self._staged = None
            checkpoint.drop_unplaced(self.folder)

    def _written(self) -> tuple[dict[str, str], float]:
        """Return the digests of the staged tensors, and the seconds that writing them took."""
        if self._staged is None:
            self.begin()
        try:
            return self._staged.result()
        finally:
            self._staged = None

    def _place(self, progress: Progress, digests: dict[str, str], staging_s: float) -> None:
        began_s = time.perf_counter()
        checkpoint.place(self.folder, progress, digests)
        self._pace.saved(staging_s + time.perf_counter() - began_s)
        self.saved_step = progress.step

    def _export(self, weights: Path) -> None:
        """Write the adapter. In this trial only its weights change, so a later export replaces that file alone."""
        folder = self.folder / "adapter"
        if self._has_export and (folder / CONFIG).is_file():
            share_file(weights, folder / WEIGHTS)
            return
        export_adapter(folder, self._config, self._layers, self._base.model, self._base.tokenizer, weights)
        self._has_export = True


def _stage(
    folder: Path, layers: dict[str, LoraLinear], state: dict[str, object], device: torch.device
) -> tuple[dict[str, str], float]:
    began_s = time.perf_counter()
    # the default stream would let copies wait for the evaluation's rows
    with torch.cuda.stream(_copy_stream(device)) if device.type == "cuda" else nullcontext():
        digests = checkpoint.stage(folder, layers, state)
    return digests, time.perf_counter() - began_s


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
