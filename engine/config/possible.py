"""Check fields of a trial's config against each other, and refuse settings that rule each other out. No torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from engine.config.matmul import Matmul
from engine.config.metrics_section import MetricsConfig
from engine.errors import InputError

if TYPE_CHECKING:
    from engine.config.trial import LoopConfig, TrainConfig

TRAIN_TOKENS = "model.train_tokens"
# Optimizer steps: the first ones compile kernels, record graphs and fill caches.
PROFILE_AFTER = 2


def check_matmul(config: TrainConfig) -> None:
    """Raise InputError if products are to be in INT8 and the base is not in NF4."""
    if config.matmul is not Matmul.BF16 and config.model.quantization != "nf4":
        quantization = config.model.quantization
        allowed = f"must be bf16 with model.quantization = {quantization}: INT8 codes are made of NF4 weights"
        raise InputError("train.matmul", config.train.matmul, allowed)
    if config.matmul is not Matmul.BF16 and config.lora.use_dora:
        raise InputError("train.matmul", config.train.matmul, "must be bf16 with lora.use_dora: each step has other weights")


def check_start(config: TrainConfig) -> None:
    """Raise InputError for LoftQ without NF4."""
    if config.lora.start == "loftq" and config.model.quantization != "nf4":
        allowed = f"makes up for what NF4 loses, and model.quantization = {config.model.quantization} loses nothing; or: pissa"
        raise InputError("lora.start", config.lora.start, allowed)


def check_offload(config: TrainConfig) -> None:
    """Raise InputError if states are to be on the host and do not have 8 bits."""
    if config.train.offload_optimizer is True and not config.optim.has_8bit_states:
        allowed = f"must be false or auto with optim.name = {config.optim.name}: only 8-bit states go to the host"
        raise InputError("train.offload_optimizer", True, f"{allowed}; or take optim.name=adamw_8bit or lion_8bit")


def check_train_tokens(config: TrainConfig) -> None:
    """Raise InputError if the trained tokens are not distinct, or other settings rule them out."""
    tokens = list(config.model.train_tokens)
    if not all(tokens) or len(set(tokens)) < len(tokens):
        raise InputError(TRAIN_TOKENS, tokens, "must be different tokens, none of them empty")
    if tokens and config.lora.start_from is not None:
        raise InputError(TRAIN_TOKENS, tokens, "must be empty with lora.start_from, whose adapter has no such rows")
    if tokens and config.matmul is not Matmul.BF16:
        raise InputError(TRAIN_TOKENS, tokens, f"needs train.matmul=bf16, not {config.train.matmul}, which was not tried with it")
    if tokens and config.optim.name == "muon":
        raise InputError(TRAIN_TOKENS, tokens, "must be empty with optim.name = muon: orthogonal steps are for A and B alone")


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
