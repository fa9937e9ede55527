"""Train one planned trial through the engine's loop, and make its record."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config.optim_section import OptimConfig
from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.data.views import load_data
from engine.errors import DivergedError, OutOfMemory, first_line
from engine.evaluation.eval_loss import evaluate, evaluation_batches
from engine.model.base import Base
from engine.sample_losses import read_sample_losses
from engine.training.loop import train
from engine.trial_report import TrialReport
from tests.search.curve_files import COMPLETE
from tests.search.design import PlannedTrial
from tests.search.tasks import TASKS, data_of

OUTCOMES = {DivergedError: "DIVERGED", OutOfMemory: "OUT_OF_MEMORY"}
FAILED = "FAILED"
NO_SAMPLES = {"sample_losses_e4": None, "sample_losses_of": None, "sample_rung": None, "sample_targets": None}


@dataclass(frozen=True)
class Scale:
    """Say how long a trial is and what it is evaluated on."""

    max_tokens: int
    num_rungs: int
    tokens_per_step: int
    eval_samples: int
    eval_length: int
    longest: int


FULL = Scale(max_tokens=393_216, num_rungs=16, tokens_per_step=4096, eval_samples=256, eval_length=512, longest=2048)
"""Six steps a rung. On an H100 a trial takes 4 to 5 s."""
TINY = Scale(max_tokens=1024, num_rungs=4, tokens_per_step=256, eval_samples=8, eval_length=64, longest=128)


@dataclass(frozen=True)
class Setting:
    """Hold what all trials of a process share. ema_horizon: of the running average, 0 for none; matmul: as in `train`."""

    model: str
    scale: Scale
    device: str
    budget_gib: float
    ema_horizon: float
    matmul: str = "bf16"

    @property
    def averages(self) -> bool:
        """Return True if the engine can average adapters and is asked to."""
        return self.ema_horizon > 0 and "ema_horizon" in OptimConfig.model_fields


class Failures:
    """Stop the process when trial after trial fails: a broken CUDA context fails all that follow."""

    MOST = 3

    def __init__(self) -> None:
        self._in_a_row = 0

    def note(self, record: dict[str, Any]) -> None:
        """Raise RuntimeError at the third trial in a row that failed."""
        self._in_a_row = self._in_a_row + 1 if record["outcome"] == FAILED else 0
        if self._in_a_row >= self.MOST:
            raise RuntimeError(f"{self._in_a_row} trials in a row failed, the last with: {record['error']}")


def config_of(setting: Setting, trial: PlannedTrial) -> TrainConfig:
    """Return the whole config of a planned trial."""
    scale, sections = setting.scale, trial.sections()
    train_file, eval_file = data_of(trial.task)
    data = {"train": str(train_file), "eval": str(eval_file), "eval_max_samples": scale.eval_samples}
    data |= {"eval_max_seq_length": scale.eval_length, **TASKS[trial.task].data}
    data["max_seq_length"] = min(sections["data"]["max_seq_length"], scale.longest)
    loop = {"max_tokens": scale.max_tokens, "num_reports": scale.num_rungs, "tokens_per_step": scale.tokens_per_step}
    loop |= {"device": setting.device, "memory_budget_gib": setting.budget_gib, **sections["train"]}
    loop |= {} if setting.matmul == "bf16" else {"matmul": setting.matmul}
    average = {"ema_horizon": setting.ema_horizon} if setting.averages else {}
    optim = {**sections["optim"], **average}
    return parse(TrainConfig, {
        "model": {"path": setting.model}, "data": data, "lora": sections["lora"], "optim": optim, "train": loop,
    })  # fmt: skip


def task_facts(base: Base, setting: Setting, trial: PlannedTrial) -> dict[str, Any]:
    """Return what is recorded of the trial's task: its samples, its budget, and the base model's loss."""
    config, scale = config_of(setting, trial), setting.scale
    train_view, eval_view = load_data(config.data, base.tokenizer)
    samples = evaluation_batches(base, eval_view, config.data.eval_max_seq_length)
    base_loss = evaluate(base, samples)
    return {
        "name": trial.task, "train": TASKS[trial.task].about, "max_tokens": scale.max_tokens, "num_rungs": scale.num_rungs,
        "tokens_per_step": scale.tokens_per_step, "eval_samples": len(eval_view), "eval_max_seq_length": scale.eval_length,
        "train_tokens": train_view.num_given_tokens, "eval_targets": samples.num_targets,
        "train_digest": train_view.digest(), "eval_digest": eval_view.digest(),
        "ema_horizon": setting.ema_horizon if setting.averages else None,
        "base_eval_loss": round(float(getattr(base_loss, "mean", base_loss)), 6),
    }  # fmt: skip


def record_trial(base: Base, setting: Setting, trial: PlannedTrial, scratch: Path) -> dict[str, Any]:
    """Train the trial in a temporary folder under `scratch`; return its record, whatever its outcome."""
    config, began_s = config_of(setting, trial), time.perf_counter()
    reports: list[TrialReport] = []
    outcome, error, samples = COMPLETE, None, None
    with tempfile.TemporaryDirectory(dir=scratch, prefix="trial-") as folder:
        try:
            reports.extend(train(config, Path(folder), base=base))
            samples = _sample_record(Path(folder), reports)
        except (DivergedError, OutOfMemory) as found:
            outcome, error = OUTCOMES[type(found)], first_line(found)
        except torch.OutOfMemoryError as found:
            outcome, error = OUTCOMES[OutOfMemory], first_line(found)
        except Exception as found:  # recorded, because the other trials need not end with it
            outcome, error = FAILED, f"{type(found).__name__}: {first_line(found)}"
    seconds = time.perf_counter() - began_s
    return {**_named(config, trial), "outcome": outcome, "error": error, **curve_of(reports), **(samples or NO_SAMPLES),
            "seconds": round(seconds, 3)}  # fmt: skip


def curve_of(reports: list[TrialReport]) -> dict[str, Any]:
    """Return the lists of a record, one entry a rung. With an average, `eval_loss` is the better one's."""
    last = reports[-1] if reports else None
    raw = [getattr(report, "raw_eval_loss", None) for report in reports]
    averages = [getattr(report, "ema_eval_loss", None) for report in reports]
    return {
        "tokens": [report.tokens_seen for report in reports],
        "loss": [round(report.eval_loss if one is None else one, 6) for report, one in zip(reports, raw)],
        "average": [round(one, 6) for one in averages] if reports and None not in averages else None,
        "elapsed_s": [round(report.elapsed_s, 3) for report in reports],
        "num_trainable": last and last.num_trainable,
        "peak_reserved_gib": last and last.peak_reserved_gib and round(last.peak_reserved_gib, 3),
    }


def _named(config: TrainConfig, trial: PlannedTrial) -> dict[str, Any]:
    variant = trial.variant
    return {
        "id": trial.id, "config": trial.config, "lr_schedule": variant.lr_schedule, "seed": variant.seed,
        "params": trial.params, "lora_alpha": config.lora.alpha, "use_rslora": config.lora.use_rslora,
    }  # fmt: skip


def _sample_record(folder: Path, reports: list[TrialReport]) -> dict[str, Any]:
    """Return what is recorded of the kept adapter's loss on each sample; samples without targets count 0."""
    kept = [report for report in reports if report.eval_loss == reports[-1].best_eval_loss][-1]  # as good and later: kept
    found = read_sample_losses(folder, kept)
    means = [round(1e4 * one / count) if count else 0 for one, count in zip(found.sums, found.num_targets)]
    return {"sample_losses_e4": means, "sample_losses_of": "kept", "sample_rung": kept.rung,
            "sample_targets": list(found.num_targets)}  # fmt: skip
