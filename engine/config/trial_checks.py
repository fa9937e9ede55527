"""Check fields of a trial's config against each other. No torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from engine.config.metrics_section import MetricsConfig
from engine.errors import InputError

if TYPE_CHECKING:
    from engine.config.trial import LoopConfig

# Optimizer steps: the first ones compile kernels, record graphs and fill caches.
PROFILE_AFTER = 2


def check_profile(profile_steps: int, max_tokens: int, longest_step: int) -> None:
    """Raise InputError if a trial may end before so many steps are traced. longest_step: in tokens."""
    certain = max(0, math.ceil(max_tokens / longest_step) - PROFILE_AFTER)
    if profile_steps > certain:
        steps = f"{max_tokens} tokens in steps of up to {longest_step}, not counting the first {PROFILE_AFTER} steps"
        raise InputError("train.profile_steps", profile_steps, f"must be at most {certain}: {steps}")


def check_metrics_section(metrics: MetricsConfig, num_rungs: int, sets: tuple[str, ...]) -> None:
    """Raise InputError for a rung or an evaluation set that the trial does not have. sets: of several, by name."""
    at, chosen = metrics.at, metrics.eval_set
    if not isinstance(at, str) and at[-1] > num_rungs:
        raise InputError("metrics.at", list(at), f"must be rungs from 1 to {num_rungs}, the reports of a trial")
    if chosen not in (sets if len(sets) > 1 else (None, *sets)) and (metrics.names or chosen is not None):
        allowed = f"must be one of {', '.join(sets)}" if sets else "must be null: data.eval is no mapping of sets"
        raise InputError("metrics.eval_set", chosen, allowed)


def check_step(bins: int, most: int, loop: LoopConfig) -> None:
    """Raise InputError for a step of more rows than `most`."""
    if bins > most:
        field = "gradient_accumulation_steps" if loop.tokens_per_step is None else "tokens_per_step"
        raise InputError(f"train.{field}", getattr(loop, field), f"must give at most {most:,} rows in one step, not {bins:,}")
