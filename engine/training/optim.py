"""Make the optimizer, and compute the learning rate from the tokens seen."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from engine.config.optim_section import OptimConfig
from engine.quant.bnb import adamw_8bit, lion

RATIO = "lr_ratio"
"""A group's rate over the trial's; a group without it has the trial's rate."""


def make_optimizer(parameter: nn.Parameter, config: OptimConfig, num_a: int = 0) -> torch.optim.Optimizer:
    """Return the optimizer over the flat adapter; `auto` is 8-bit AdamW on CUDA and 32-bit on the CPU.

    num_a: elements of all A, which come first. LoRA+ (Hayou et al., arXiv:2402.12354) takes the two
    parts as two groups over the same memory, so the parameter must have its gradient by now.
    """
    groups = [parameter] if config.loraplus_lr_ratio == 1.0 else _apart(parameter, num_a, config.loraplus_lr_ratio)
    options = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}
    if config.is_lion:
        return lion(groups, eight_bit=config.name == "lion_8bit", **options)
    eight_bit = parameter.is_cuda if config.name == "auto" else config.name == "adamw_8bit"
    return (adamw_8bit if eight_bit else torch.optim.AdamW)(groups, eps=config.eps, **options)


def _apart(parameter: nn.Parameter, num_a: int, ratio: float) -> list[dict[str, Any]]:
    """Return the groups of A and of B, as views of the parameter and of its gradient."""
    if parameter.grad is None:
        raise ValueError("the flat parameter must have its gradient before it is taken apart")
    groups = []
    for part, factor in ((slice(None, num_a), 1.0), (slice(num_a, None), ratio)):
        view = nn.Parameter(parameter.detach()[part])
        view.grad = parameter.grad[part]
        groups.append({"params": [view], RATIO: factor})
    return groups


def learning_rate(config: OptimConfig, progress: float) -> float:
    """Return the rate at `progress` = tokens seen / max tokens, in [0, 1].

    Warm-up is linear; the schedule then falls to min_lr_ratio of the peak rate. With LoRA+ it is
    the rate of A.
    """
    if progress < config.warmup_ratio:
        return config.learning_rate * progress / config.warmup_ratio
    floor = config.min_lr_ratio
    return config.learning_rate * (floor + (1.0 - floor) * _shape(config, progress))


def _shape(config: OptimConfig, progress: float) -> float:
    """Return the schedule without its floor, in [0, 1]. The decay of wsd is that of Hägele et al., arXiv:2405.18392."""
    done = min(1.0, (progress - config.warmup_ratio) / (1.0 - config.warmup_ratio))
    match config.lr_schedule:
        case "linear":
            return 1.0 - done
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        case "wsd":
            left = min(1.0, (1.0 - progress) / config.decay_ratio)
            return left / (1.0 + math.sqrt(1.0 - left))  # 1 - sqrt(1 - left), and not 0 near the end
    return 1.0


def step_middle(tokens_seen: int, num_tokens: int, max_tokens: int) -> float:
    """Return the progress at the middle of a step, in (0, 1). The step's learning rate is that one.

    A step that would run past max_tokens counts as one that ends there. At or beyond the end the
    schedule may be 0, and the step would change nothing.
    """
    start = min(tokens_seen, max(0, max_tokens - num_tokens))
    return (start + min(num_tokens, max_tokens) / 2) / max_tokens


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the rate of every parameter group; that of B is a multiple with LoRA+."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get(RATIO, 1.0)
