"""Build reports: a test names the numbers that matter to it, the rest is filled in."""

from __future__ import annotations

from typing import Any

from engine.command_answers import DataAccount
from engine.trial_report import TrialReport

PART_SECONDS = ("model_s", "data_s", "attach_s", "train_s", "recording_s", "eval_s", "save_s", "metrics_s")


def make_report(rung: int = 1, eval_loss: float = 1.0, **changes: Any) -> TrialReport:
    """Return a report of a trial with 1,000 tokens a rung, on a machine that predicts no peak."""
    values = {
        "rung": rung, "tokens_seen": 1000 * rung, "target_tokens_seen": 900 * rung, "step": 10 * rung, "epoch": 0.1 * rung,
        "train_loss": eval_loss, "eval_loss": eval_loss, "best_eval_loss": eval_loss, "learning_rate": 1e-3, "grad_norm": 1.0,
        "tokens_per_second": 50.0, "step_time_ms": 9.0, "peak_allocated_gib": 1.5, "elapsed_s": 1.0 * rung, "num_trainable": 100,
    }  # fmt: skip
    return TrialReport(**{**values, **changes})


def make_account(part: str = "training", **changes: Any) -> DataAccount:
    """Return the account of 60 rows at 512 tokens, of which 16 are lost."""
    values = {
        "max_seq_length": 512, "num_read": 60, "num_bad": 6, "num_equal": 1, "num_chosen": 50, "num_used": 44, "num_samples": 50,
        "num_cut": 3, "num_dropped": 6, "num_lost_tokens": 500, "num_tokens": 2000, "num_targets": 500, "num_leaked": 0,
        "num_bos": 0, "num_eos": 44,
    }  # fmt: skip
    return DataAccount(part=part, **{**values, **changes})
