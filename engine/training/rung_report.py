"""Make a trial's report at a rung from its progress, its plan and the times of its parts."""

from __future__ import annotations

import time
from typing import Any

from engine.evaluation.better_adapter import BetterAdapter
from engine.planning.compute_plan import ComputePlan
from engine.training.checkpoint import Progress
from engine.training.step_sums import StepSums
from engine.trial_report import ATTACH, DATA, EVALUATION, MODEL, SAVING, PartClock, TrialReport


class RungTimes:
    """Hold what set-up took, and the time of each part since the previous report."""

    def __init__(self, parts: PartClock) -> None:
        """Begin set-up. parts: the trial's clock, on which the caller may have loaded the model."""
        self.parts = parts
        self._setup_s = -time.perf_counter()
        self._reported: dict[str, float] = {}
        self._setup: dict[str, float] = {}

    def end_setup(self) -> None:
        """Note what set-up took: the first step comes next."""
        self._setup_s += time.perf_counter()
        self._setup = {"setup_s": self._setup_s, **{f"{part}_s": self.parts.seconds(part) for part in (MODEL, DATA, ATTACH)}}

    def take(self) -> dict[str, float]:
        """Return what a report says of set-up, and what evaluation and saves took since the last call."""
        now = {f"{part}_s": self.parts.seconds(part) for part in (EVALUATION, SAVING)}
        new = {name: seconds - self._reported.get(name, 0.0) for name, seconds in now.items()}
        self._reported = now
        return {**self._setup, **new}


def make_report(
    progress: Progress, step_sums: StepSums, found: BetterAdapter, plan: ComputePlan, times: RungTimes, **at: Any
) -> TrialReport:
    """Return the report. found: the evaluation. at: rung, epoch, learning_rate and num_trainable."""
    sums, eval_loss, task, excess = step_sums.sums, found.kept.mean, found.task, found.excess
    order = (max(excess or 0.0, 0.0), eval_loss)
    return TrialReport(
        tokens_seen=progress.tokens_seen,
        target_tokens_seen=progress.target_tokens_seen,
        step=progress.step,
        train_loss=step_sums.train_loss,
        eval_loss=eval_loss,
        best_eval_loss=min([*((report.over_limits, report.eval_loss) for report in progress.reports), order])[1],
        eval_losses=found.kept.means,
        eval_excess=excess,
        grad_norm=sums.grad_norm,
        tokens_per_second=sums.num_tokens / sums.seconds,
        step_time_ms=1000.0 * sums.seconds / sums.num_steps,
        peak_allocated_gib=progress.peak_allocated_gib,
        peak_reserved_gib=progress.peak_reserved_gib,
        elapsed_s=progress.elapsed_s,
        predicted_peak_gib=None if plan.memory is None else plan.memory.peak_gib,
        num_out_of_memory=progress.num_out_of_memory,
        micro_batch_size=plan.micro_batch_size,
        activation_checkpointing=str(plan.policy.setting).lower(),
        train_s=sums.seconds - sums.recording_s,
        recording_s=sums.recording_s + step_sums.recorded_since_s,
        raw_eval_loss=None if found.average is None else found.last.mean,
        ema_eval_loss=None if found.average is None else found.average.mean,
        metrics={**found.kept.preference_metrics, **({} if task is None else task.means)},
        **({} if task is None else {"metrics_error": task.error, "metrics_s": task.seconds}),
        **times.take(),
        **at,
    )
