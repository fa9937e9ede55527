"""Save a trial: its checkpoint, its reports, and the adapter of its best rung.

Tensors are most of the work: copies from the device, digests and flushed files. A thread does it
beside the evaluation of the last adapter, which changes neither adapter nor optimizer. The
evaluation of a running average does: it waits for the thread first. What depends on the evaluation
follows when both have ended: the losses of samples, the adapter for users, the state with the
report, and the line in `reports.jsonl`. A report is therefore durable before anyone hears of it. A
fault of the thread is raised where its files are asked for.

The adapter for users is the checkpoint's own file, linked, or the average in a file of its own.
"""

from __future__ import annotations

import functools
import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch

from engine.adapter.lora import AnyLora
from engine.adapter.peft_files import CONFIG, WEIGHTS, adapter_bytes, export_adapter
from engine.adapter.running_average import RunningAverage
from engine.config.metrics_section import sign_of
from engine.config.trial import TrainConfig
from engine.evaluation.better_adapter import BetterAdapter
from engine.model.base import Base
from engine.sample_losses import write_sample_losses
from engine.scoring.answers_file import write_answers
from engine.system.files import replace_file, share_file, write_text
from engine.training import checkpoint
from engine.training.checkpoint import Pace, Progress, Tensors
from engine.trial_report import REPORTS, SAVING, PartClock, TrialReport, kept_report


class TrialFiles:
    """Write the files of one trial. Close it before anything changes adapter or optimizer from outside."""

    def __init__(
        self,
        trial_folder: Path,
        config: TrainConfig,
        base: Base,
        tensors: Tensors,
        average: RunningAverage,
        pace: Pace,
        parts: PartClock,
    ) -> None:
        """tensors: what checkpoints hold. average: the same as in `tensors`, if there is one."""
        self.folder, self._config, self._base = trial_folder, config, base
        self._chosen_by = config.metrics.choose_by, sign_of(config.metrics.model_dump(), config.metrics.choose_by)
        self._tensors, self._average, self._pace, self._parts = tensors, average, pace, parts
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self._staged: Future[tuple[dict[str, str], float]] | None = None
        self._has_export = False
        self.saved_step = 0

    def is_due(self) -> bool:
        """Return True if it is time for a save between two reports."""
        return self._pace.is_due()

    def begin(self) -> None:
        """Begin to write the tensors as they are now, after all that the device still has to compute.

        They must not change until `wait` or the next save returns.
        """
        state, device, stream = checkpoint.state_of(self._tensors), self._base.device, None
        if device.type == "cuda":
            stream = _copy_stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
        self._staged = self._thread.submit(_stage, self.folder, self._tensors.layers, state, stream)

    def wait(self) -> None:
        """Wait for the tensors that `begin` had written: the next save takes them, whatever changes from here on."""
        if self._staged is not None:
            with self._parts.part(SAVING):
                self._staged.result()

    def save(self, progress: Progress) -> None:
        """Write the checkpoint of this moment, from the tensors that `begin` had written if it was called."""
        with self._parts.part(SAVING):
            self._place(progress, *self._written())

    def report(self, progress: Progress, report: TrialReport, found: BetterAdapter) -> None:
        """Write the better adapter if its rung is the best, the checkpoint, the answers and all reports.

        report: the last one of the progress. found: the evaluation that it tells of.
        """
        with self._parts.part(SAVING):
            digests, staging_s = self._written()
            if found.task is not None:
                write_answers(self.folder, found.task.at(report.rung))
            if kept_report(progress.reports, *self._chosen_by) is report:
                write_sample_losses(self.folder, report.rung, found.kept)
                with self._average.in_place() if found.is_average else nullcontext():
                    self._export(None if found.is_average else checkpoint.staged_adapter(self.folder))
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

    def _export(self, weights: Path | None) -> None:
        """Write the adapter that is in place. weights: the flushed file that has it, None if none does.

        In this trial only the weights change, so a later export replaces that file alone.
        """
        folder, layers = self.folder / "adapter", self._tensors.layers
        if not self._has_export or not (folder / CONFIG).is_file():
            export_adapter(folder, self._config, layers, self._base.model, self._base.tokenizer, weights)
            self._has_export = True
        elif weights is None:
            replace_file(folder / WEIGHTS, adapter_bytes(layers))
        else:
            share_file(weights, folder / WEIGHTS)


def _stage(
    folder: Path, layers: dict[str, AnyLora], state: dict[str, object], stream: torch.cuda.Stream | None
) -> tuple[dict[str, str], float]:
    began_s = time.perf_counter()
    # the default stream would let copies wait for the evaluation's rows
    with torch.cuda.stream(stream) if stream is not None else nullcontext():
        digests = checkpoint.stage(folder, layers, state)
    return digests, time.perf_counter() - began_s


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
