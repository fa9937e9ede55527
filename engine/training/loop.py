"""Train one trial: `for report in train(config, trial_folder)`. The caller may stop at any report.

Before each report, `train` writes three things to `trial_folder`: a checkpoint, all reports
(`reports.jsonl`), and the adapter with the lowest eval_loss so far (`adapter/`, PEFT format) with
its losses on each sample. With `optim.ema_horizon` that may be a running average. Between reports
it saves the checkpoint from time to time, and when the caller asks it to stop.

Called again on the same folder, `train` continues after the last step in the checkpoint, with the
same numbers as without a stop (bit for bit on the CPU).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from engine.adapter.lora import AnyLora, detach
from engine.adapter.running_average import RunningAverage
from engine.adapter.start import attach_started
from engine.config.trial import TrainConfig
from engine.data.view import make_cursor
from engine.data.views import load_recorded
from engine.errors import Interrupted, OutOfMemory
from engine.evaluation.better_adapter import BetterAdapter, evaluate_both, with_scores
from engine.evaluation.eval_limits import eval_limits
from engine.evaluation.eval_loss import evaluation_batches
from engine.evaluation.matmul_check import exempt_layers
from engine.evaluation.task_metrics import TaskMetrics
from engine.model.base import Base
from engine.model.device import free, limit_memory, peak_reserved_gib, pick_device
from engine.model.load import load_base
from engine.shape.policies import Policy
from engine.training import checkpoint
from engine.training.card_plan import CardPlanner, memory_limit_gib
from engine.training.checkpoint import Pace, Progress, Sums, Tensors
from engine.training.divergence import check_loss
from engine.training.optim import learning_rate, make_optimizer, place_states, set_learning_rate, step_middle
from engine.training.passes import Passes, StepResult
from engine.training.profiler import traced
from engine.training.recordings import Recordings
from engine.training.rung_report import RungTimes, make_report
from engine.training.saving import TrialFiles
from engine.training.step_sums import StepSums
from engine.trial_report import ATTACH, DATA, EVALUATION, MODEL, RECORDING, SAVING, TRAIN, PartClock, TrialReport

T = TypeVar("T")


def train(
    config: TrainConfig,
    trial_folder: Path,
    *,
    base: Base | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    pace: Pace | None = None,
    inputs: Mapping[str, str] | None = None,
    parts: PartClock | None = None,
) -> Iterator[TrialReport]:
    """Train one adapter and yield a TrialReport at each point of `config.train.report_grid()`.

    A continued run first yields a report that a crash withheld. `auto` settings are planned for
    this card. If a step runs out of memory, a leaner plan computes it again.

    base: a loaded base model that matches `config.model`, returned without the adapter; None loads
    it for this trial. interrupted: called before each step and each evaluation row. Once True, the
    last step is saved and Interrupted raised. pace: decides when to save between reports. inputs:
    the sweep's recorded digests. parts: the caller's clock of this trial. Raises InputError,
    InputsChanged, DivergedError, CheckpointError, OutOfMemory, Interrupted.
    """
    times = RungTimes(parts or PartClock())
    device = pick_device(config.train.device)
    with times.parts.part(MODEL):
        resident = base or load_base(config.model, device)
    if not resident.matches(config.model, device):
        raise ValueError("base must match config.model and the device of config.train")
    layers: dict[str, AnyLora] = {}
    budget = config.train.memory_budget_gib if device.type == "cuda" else None
    try:
        if budget is not None:
            limit_memory(budget, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # else an earlier trial's peak would count
        with times.parts.part(MODEL):
            exempt = exempt_layers(resident, config.matmul)
        torch.manual_seed(config.train.seed)
        with times.parts.part(ATTACH):
            run = _begun(config, trial_folder, resident, layers, interrupted, pace, times, inputs, exempt)
        with traced(config.train.profile_steps, trial_folder / "profile", device) as after_step:
            yield from run.reports(after_step)
    finally:
        detach(resident.model, layers)
        resident.add_noise(None)
        resident.checkpoint_activations(Policy.KEEP)
        resident.model.eval()
        layers.clear()
        free(device)
        if budget is not None:
            limit_memory(math.inf, device)


def _begun(config: TrainConfig, trial_folder: Path, base: Base, layers: dict[str, AnyLora], *others: Any) -> _Run:
    """Attach the adapter, and return the trial. If there is no room, earlier trials' recordings make way."""

    def begin() -> _Run:
        layers.update(attach_started(base.model, base.linear_names, config))
        return _Run(config, trial_folder, base, layers, *others)

    try:
        return begin()
    except torch.OutOfMemoryError:
        if not Recordings.of(base).clear():
            raise
    detach(base.model, layers)  # only here, because the traceback keeps the failed adapter's tensors alive
    layers.clear()
    free(base.device)
    return begin()


class _Run:
    """Hold the state of one trial, with its checkpoint loaded. times: begun when `train` was called."""

    def __init__(
        self,
        config: TrainConfig,
        trial_folder: Path,
        base: Base,
        layers: dict[str, AnyLora],
        interrupted: Callable[[], bool],
        pace: Pace | None,
        times: RungTimes,
        inputs: Mapping[str, str] | None,
        exempt: tuple[str, ...],
    ) -> None:
        self.config, self.base, self.planner = config, base, CardPlanner.here(config, base)
        self.plan = self.planner.fastest()
        self.times, self.parts = times, times.parts
        with self.parts.part(DATA):
            self.train_view, eval_view = load_recorded(config, base.tokenizer, inputs)
            self.config = config = config.within_epochs(int(self.train_view.lengths.sum()))
            samples = evaluation_batches(base, eval_view, config.data.eval_max_seq_length)
            self.cursor = make_cursor(self.train_view, config)
            self.task = TaskMetrics.of(config, base, eval_view)
            self.passes = Passes(config, base, layers, self.train_view, samples, self.cursor)
            self.passes.find_pairs(eval_view, interrupted)  # before a checkpoint is loaded: the adapter is as at the start
        self.adapter = self.passes.adapter
        self.optimizer = make_optimizer(self.adapter.parameter, config.optim, self.adapter.num_a, self.adapter.shapes)
        place_states(self.optimizer, self.plan.offload_optimizer)
        self.average = RunningAverage(self.adapter, config.optim.ema_horizon)
        tensors = Tensors(layers, self.optimizer, self.average.values)
        loaded = checkpoint.load(trial_folder, fingerprint := config.fingerprint(), tensors)
        self.progress = loaded or Progress(fingerprint, masks=checkpoint.MASKS, exempt=list(exempt))
        self.passes.exempt = tuple(self.progress.exempt)
        if config.lora.lora_dropout:
            checkpoint.warn_of_masks(trial_folder, self.progress)
        self.files = TrialFiles(trial_folder, config, base, tensors, self.average, pace or Pace(), self.parts)
        self.files.saved_step = self.progress.step
        self.adapter.refresh()
        self.cursor.seek(self.progress.epoch, self.progress.position)
        self.plan = self.planner.changed(self.plan, self.progress.plan) if self.progress.plan else self.plan
        self._limit_gib, self._interrupted = memory_limit_gib(config, base.device), interrupted
        self._follow_plan()
        base.model.train()

    def reports(self, after_step: Callable[[], None]) -> Iterator[TrialReport]:
        """Train to each report that is due, and yield it. after_step: called after each step."""
        try:
            yield from self._reports(after_step)
        finally:
            with self.parts.part(SAVING):
                self.files.close()

    def _reports(self, after_step: Callable[[], None]) -> Iterator[TrialReport]:
        grid = self.config.train.report_grid()
        if self.progress.reports:
            num_passed_on = self.files.num_reported()
            self.files.write_reports(self.progress)
            if len(self.progress.reports) > num_passed_on:  # a crash withheld the last one
                yield self.progress.reports[-1]
        if len(self.progress.reports) < len(grid):
            with self.parts.part(RECORDING):
                self._with_room(lambda: self.passes.record())
            if not self.progress.step:  # the checkpoint keeps them from the first step on
                with self.parts.part(EVALUATION):
                    self.progress.base_eval_losses = self._with_room(lambda: self.passes.base_eval_losses(self._interrupted))
            self._recorded_s = self.passes.recording_s
        self.times.end_setup()
        for rung in range(len(self.progress.reports) + 1, len(grid) + 1):
            report, found = self._train_to(rung, grid[rung - 1], after_step)
            self.files.report(self.progress, report, found)
            if rung == len(grid):
                self.files.finish()
            yield report

    def _train_to(self, rung: int, tokens: int, after_step: Callable[[], None]) -> tuple[TrialReport, BetterAdapter]:
        """Run optimizer steps until `tokens` have been seen, at least one, then evaluate."""
        vocab_size = self.base.model.config.get_text_config().vocab_size
        progress, limits = self.progress, eval_limits(self.config.data, self.progress.base_eval_losses)
        step_sums = StepSums(self.base.device, vocab_size, progress.since_report, self.parts)
        with self.parts.part(TRAIN):
            while progress.tokens_seen < tokens or progress.since_report.num_steps == 0:
                self._keep_safe(step_sums)
                taken, grad_norm = self._step()
                self._count_recordings(TRAIN)
                step_sums.add(taken.loss, grad_norm, taken.num_tokens, taken.divisor, is_first=self._plan_is_new)
                self._plan_is_new = False
                after_step()
                progress.count_step(taken.num_tokens, taken.num_targets)
                self.average.update(taken.num_tokens, progress.tokens_seen)
            step_sums.close()
        with self.parts.part(EVALUATION):
            self.files.begin()
            keep_safe = partial(self._keep_safe, step_sums)
            found = evaluate_both(lambda: self.passes.evaluate(keep_safe), self.average, self.files.wait, limits)
            self._count_recordings(EVALUATION)
            for losses in filter(None, (found.last, found.average)):
                check_loss("eval_loss", losses.mean, vocab_size)
            self._note_where()
            found = with_scores(found, self.task, rung, self.average, keep_safe)
        progress.elapsed_s += step_sums.sums.seconds
        return self._report(rung, step_sums, found), found

    def _keep_safe(self, step_sums: StepSums) -> None:
        """Save if a save is due. If the caller asked to stop, save and raise Interrupted."""
        must_end = self._interrupted()
        if self.progress.step > self.files.saved_step and (must_end or self.files.is_due()):
            step_sums.settle()
            self._note_where()
            self.files.save(self.progress)
        if must_end:
            raise Interrupted(f"stopped on request after step {self.progress.step}")

    def _note_where(self) -> None:
        progress = self.progress
        progress.epoch, progress.position = self.cursor.epoch, self.cursor.position
        progress.peak_allocated_gib = max(progress.peak_allocated_gib, self.passes.peak_gib())
        progress.peak_reserved_gib = max(progress.peak_reserved_gib, peak_reserved_gib(self.base.device))

    def _step(self) -> tuple[StepResult, Tensor]:
        """Take one optimizer step; return what its rows gave, and the gradient norm. Neither waits for the device."""
        bins = self.cursor.take(self.config.bins_per_step)
        taken = self._with_room(lambda: self.passes.gradients(bins, self.progress.step))
        grad_norm = nn.utils.clip_grad_norm_(self.adapter.parameter, self.config.optim.max_grad_norm or math.inf)
        middle = step_middle(self.progress.tokens_seen, taken.num_tokens, self.config.train.max_tokens)
        set_learning_rate(self.optimizer, learning_rate(self.config.optim, middle))
        self.optimizer.step()
        self.adapter.refresh()
        self.adapter.zero_grad()
        return taken, grad_norm

    def _with_room(self, compute: Callable[[], T]) -> T:
        """Return what `compute` returns, under a plan with which the memory suffices."""
        while True:
            try:
                return compute()
            except torch.OutOfMemoryError:
                pass  # the traceback keeps the failed pass's tensors alive until this block ends
            self._make_room()

    def _make_room(self) -> None:
        """Drop the step's gradients, and earlier trials' recordings or else a part of the plan, or raise OutOfMemory."""
        self.adapter.zero_grad()
        if self.passes.drop_earlier():
            free(self.base.device)
            self._follow_plan()
            return
        measured, plan = self.passes.peak_gib(), self.planner.leaner(self.plan, peak_reserved_gib(self.base.device))
        predicted = None if self.plan.memory is None else self.plan.memory.peak_gib
        if plan is None:
            known = "" if predicted is None else f"predicted peak {predicted:.2f} GiB, "
            raise OutOfMemory(f"out of memory at {self.plan.describe()}: {known}measured {measured:.2f} GiB", predicted, measured)
        self.plan = plan
        self.progress.plan, self.progress.num_out_of_memory = plan.settings(), self.progress.num_out_of_memory + 1
        self.passes.drop_all()
        self._follow_plan()
        free(self.base.device)

    def _follow_plan(self) -> None:
        place_states(self.optimizer, self.plan.offload_optimizer)
        self.passes.follow(self.plan, self._limit_gib)
        self._plan_is_new = True

    def _count_recordings(self, part: str) -> None:
        """Count as RECORDING what recordings took of the part, since the last call."""
        recorded_s = self.passes.recording_s
        self.parts.move(part, RECORDING, recorded_s - self._recorded_s)
        self._recorded_s = recorded_s

    def _report(self, rung: int, step_sums: StepSums, found: BetterAdapter) -> TrialReport:
        rate, num_trainable = self.optimizer.param_groups[0]["lr"], self.adapter.num_trainable
        at = {"rung": rung, "epoch": self.cursor.epochs, "learning_rate": rate, "num_trainable": num_trainable}
        report = make_report(self.progress, step_sums, found, self.plan, self.times, **at)
        self.progress.reports.append(report)
        self.progress.since_report = Sums()
        return report
