"""Build reports: a test names the numbers it is about, and the others are filled in."""

from __future__ import annotations

from typing import Any

from engine.trial_report import TrialReport


def make_report(rung: int = 1, eval_loss: float = 1.0, **changes: Any) -> TrialReport:
    """A report of a trial with 1,000 tokens a rung, on a machine where no peak is predicted."""
    values = {
        "rung": rung, "tokens_seen": 1000 * rung, "target_tokens_seen": 900 * rung, "step": 10 * rung, "epoch": 0.1 * rung,
        "train_loss": eval_loss, "eval_loss": eval_loss, "best_eval_loss": eval_loss, "learning_rate": 1e-3, "grad_norm": 1.0,
        "tokens_per_second": 50.0, "step_time_ms": 9.0, "peak_allocated_gib": 1.5, "elapsed_s": 1.0 * rung, "num_trainable": 100,
    }  # fmt: skip
    return TrialReport(**{**values, **changes})
