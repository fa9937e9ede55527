"""Make the AdamW optimizer, and compute the learning rate from the tokens seen."""

from __future__ import annotations

import math

import torch
from torch import nn

from engine.config.trial import OptimConfig
from engine.quant.bnb import adamw_8bit


def make_optimizer(parameter: nn.Parameter, config: OptimConfig) -> torch.optim.Optimizer:
    """Return AdamW over the flat adapter; `auto` is 8-bit on CUDA and 32-bit on the CPU."""
    options = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    eight_bit = parameter.is_cuda if config.name == "auto" else config.name == "adamw_8bit"
    return adamw_8bit([parameter], **options) if eight_bit else torch.optim.AdamW([parameter], **options)


def learning_rate(config: OptimConfig, progress: float) -> float:
    """Return the rate at `progress` = tokens seen / max tokens, in [0, 1].

    Warm-up is linear; the schedule then falls to min_lr_ratio of the peak rate.
    """
    if progress < config.warmup_ratio:
        return config.learning_rate * progress / config.warmup_ratio
    done = min(1.0, (progress - config.warmup_ratio) / (1.0 - config.warmup_ratio))
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[config.lr_schedule]
    floor = config.min_lr_ratio
    return config.learning_rate * (floor + (1.0 - floor) * shape)


def step_middle(tokens_seen: int, num_tokens: int, max_tokens: int) -> float:
    """Return the progress at the middle of a step, in (0, 1). The step's learning rate is that one.

    A step that would run past max_tokens counts as one that ends there. At or beyond the end the
    schedule may be 0, and the step would change nothing.
    """
    start = min(tokens_seen, max(0, max_tokens - num_tokens))
    return (start + min(num_tokens, max_tokens) / 2) / max_tokens


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value
