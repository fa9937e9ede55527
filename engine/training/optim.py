"""Make the optimizer, and compute the learning rate from the tokens seen.

Shape letters: N matrices of one shape, R and D their sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.config.optim_section import OptimConfig
from engine.quant.bnb import adamw_8bit, lion
from engine.quant.host_states import StatesOnHost

RATIO = "lr_ratio"
"""A group's rate over the trial's; a group without it has the trial's rate."""


def make_optimizer(
    parameter: nn.Parameter, config: OptimConfig, num_a: int = 0, shapes: Sequence[torch.Size] = ()
) -> torch.optim.Optimizer:
    """Return the optimizer over the flat adapter; `auto` is 8-bit AdamW on CUDA and 32-bit on the CPU.

    num_a: elements of all A, which come first. LoRA+ (Hayou et al., arXiv:2402.12354) takes the two
    parts as two groups over the same memory, so the parameter must have its gradient by now.
    shapes: of all A and B, in the parameter's order, which Muon steps as matrices.
    """
    if config.name == "muon":
        return Muon(parameter, config, num_a, shapes)
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


class Muon(torch.optim.Optimizer):
    """Step each A and B by its orthogonalised momentum (Jordan et al., 2024), as torch.optim.Muon does.

    Steps have the size of AdamW's, 0.2 * sqrt(max(rows, columns)) (Liu et al., arXiv:2502.16982), so that
    its rates fit. Matrices of one shape are orthogonalised together, in a few launches. What lies
    behind them in the parameter, DoRA's magnitudes, takes steps of AdamW.
    """

    def __init__(self, parameter: nn.Parameter, config: OptimConfig, num_a: int, shapes: Sequence[torch.Size]) -> None:
        self._config, self._ratio = config, config.loraplus_lr_ratio
        self._by_shape: dict[tuple[torch.Size, bool], list[int]] = {}
        self._end = 0
        for shape in shapes:
            self._by_shape.setdefault((shape, self._end >= num_a), []).append(self._end)
            self._end += shape.numel()
        super().__init__([parameter], {"lr": config.learning_rate})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take one step; the gradient stays as it is."""
        (group,) = self.param_groups
        (parameter,), rate, config = group["params"], group["lr"], self._config
        state = self.state[parameter]
        if not state:
            zeros = {name: torch.zeros_like(parameter[self._end :]) for name in ("mean", "mean_square")}
            state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(parameter[: self._end]), **zeros}
        state["step"] += 1
        momentum, gradient = state["momentum"], parameter.grad[: self._end]
        momentum.lerp_(gradient, 1 - config.beta1)
        update = gradient.lerp(momentum, config.beta1)  # Nesterov's
        for (shape, is_b), starts in self._by_shape.items():
            own = rate * self._ratio if is_b else rate
            parts = [update[at : at + shape.numel()].view(shape) for at in starts]
            steps = (own * 0.2 * math.sqrt(max(shape))) * orthogonalised(torch.stack(parts))
            torch._foreach_copy_(parts, list(steps.float().unbind(0)))  # one by one, the host launches hundreds
        _decay(parameter.detach(), num_a=self._num_a(), rate=rate, ratio=self._ratio, weight_decay=config.weight_decay)
        parameter[: self._end].sub_(update)
        self._step_others(parameter, state, rate * self._ratio)

    def _num_a(self) -> int:
        return min((starts[0] for (_, is_b), starts in self._by_shape.items() if is_b), default=self._end)

    def _step_others(self, parameter: nn.Parameter, state: dict[str, Any], rate: float) -> None:
        """Step what is no matrix by AdamW. Its decay is done."""
        config, gradient, count = self._config, parameter.grad[self._end :], float(state["step"])
        if not gradient.numel():
            return
        state["mean"].lerp_(gradient, 1 - config.beta1)
        state["mean_square"].mul_(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
        root = (state["mean_square"] / (1 - config.beta2**count)).sqrt_().add_(config.eps)
        parameter[self._end :].addcdiv_(state["mean"], root, value=-rate / (1 - config.beta1**count))


def _decay(values: Tensor, num_a: int, rate: float, ratio: float, weight_decay: float) -> None:
    values[:num_a].mul_(1 - rate * weight_decay)
    values[num_a:].mul_(1 - rate * ratio * weight_decay)


def orthogonalised(matrices_NRD: Tensor) -> Tensor:
    """Return each matrix with its singular values near 1, in bfloat16, by five steps of Newton and Schulz."""
    is_tall = matrices_NRD.shape[1] > matrices_NRD.shape[2]
    x = (matrices_NRD.mT if is_tall else matrices_NRD).bfloat16()
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    a, b, c = 3.4445, -4.775, 2.0315
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


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


def place_states(optimizer: torch.optim.Optimizer, on_host: bool) -> None:
    """Put 8-bit states into host memory, or back to the device; others stay where they are."""
    if isinstance(optimizer, StatesOnHost):
        optimizer.place_states(on_host)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the rate of every parameter group; that of B is a multiple with LoRA+."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get(RATIO, 1.0)
