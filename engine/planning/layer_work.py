"""Count the arithmetic and the bytes of one layer's forward and backward pass. No torch.

engine/planning/speed.py makes times of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.memory.tensor_sizes import Sizes
from engine.planning.cards import Card
from engine.shape.compute_limits import FLASH_HEAD
from engine.shape.families import INPUT_GATE, INPUT_PROJECTION
from engine.shape.layer_plan import LayerPlan
from engine.shape.model_shape import ModelShape
from engine.shape.policies import Policy

# Flash attention's backward pass reaches this share of its forward pass's speed (H100).
ATTENTION_BACKWARD = 0.89
# Time of attention over heads wider than flash attention takes, in units of flash attention's. An
# estimate, not measured.
WIDE_HEADS = 3.0
# Attention with a softcap is plain matrix operations: bytes a score, forward and backward. An
# estimate.
EAGER_BYTES = (60, 110)
NF4_BYTES = 0.516  # a packed weight, scales included


@dataclass
class LayerWork:
    """The work of one layer's pass.

    `matmul`, `thin` (adapters) and `attention` are flops; the others are bytes, by what moves them.
    """

    matmul: float = 0.0
    thin: float = 0.0
    attention: float = 0.0
    adapter_bytes: float = 0.0
    plain_bytes: float = 0.0
    activation_bytes: float = 0.0
    nf4_bytes: float = 0.0
    eager_bytes: float = 0.0


@dataclass(frozen=True)
class StepShape:
    """The values that all passes of one micro-batch share."""

    shape: ModelShape
    card: Card
    sizes: Sizes
    tokens: int
    length: int
    is_fused: bool
    is_packed: bool
    attention: Literal["flash", "cudnn"]
    parameters: dict[str, int] = field(default_factory=dict)


def forward_work(plan: LayerPlan, step: StepShape) -> LayerWork:
    work = LayerWork()
    for group in step.shape.groups:
        _add_matmul(work, group, plan, step)
    s = step.sizes
    work.plain_bytes = _attention_half_bytes(step) + 4 * s.x + 3 * s.x + 2 * s.x * _norms_after(step.shape)
    work.activation_bytes = 3 * s.f
    _add_attention(work, step, 1.0, EAGER_BYTES[0])
    return work


def backward_work(plan: LayerPlan, step: StepShape) -> LayerWork:
    """Return the work of a backward pass, with the recomputation before it.

    Recomputation stops before the down projection, and dequantises gate and up only once.
    """
    work, s, shape = LayerWork(), step.sizes, step.shape
    if not plan.trained:
        return work
    for group in shape.groups:
        if group != "qkv" or plan.needs_dx:
            _add_matmul(work, group, plan, step, is_backward=True)
    norms = 2 * s.x + 4 * s.x + 4 * s.x + 4 * s.x * _norms_after(shape) + (3 * (s.q + s.k) if _has_qk_norm(shape) else 0)
    norms += 4 * s.x if shape.layer.multiplier else 0
    work.plain_bytes = norms + 2 * (s.q + s.k) + 2 * s.qkv
    work.activation_bytes = 6 * s.f
    _add_attention(work, step, 2.5, EAGER_BYTES[1])
    if not plan.policy.keeps_attention:
        for group in ("qkv", "o"):
            _add_matmul(work, group, plan, step)
        work.plain_bytes += _attention_half_bytes(step) + 4 * s.x
        _add_attention(work, step, ATTENTION_BACKWARD, EAGER_BYTES[0])  # at the speed of a forward pass
    if plan.policy is not Policy.KEEP and (plan.policy is not Policy.HOST or s.tile is not None):
        work.matmul += 2 * step.tokens * step.parameters["gate_up"]
        if not step.is_fused or shape.layer.mlp.after:
            _add_matmul(work, "down", plan, step)
            work.activation_bytes += 3 * s.f
    return work


def _add_matmul(work: LayerWork, group: str, plan: LayerPlan, step: StepShape, is_backward: bool = False) -> None:
    """Add the matmuls of one group with its adapters.

    The activation kernels add the low-rank terms of gate, up and the down projection's gradient.
    """
    number, s = step.parameters[group], step.sizes
    work.matmul += 2 * step.tokens * number
    if step.is_packed and group not in plan.cached:
        work.nf4_bytes += (2 + NF4_BYTES) * number
    if not plan.ranks[group]:
        return
    inputs = {"qkv": s.x, "o": s.q, "gate_up": s.x, "down": s.f, INPUT_GATE: s.x, INPUT_PROJECTION: s.p}[group]
    outputs = {"qkv": s.qkv, "o": s.x, "gate_up": 2 * s.f, "down": s.x, INPUT_GATE: s.p, INPUT_PROJECTION: s.x}[group]
    passes = 2 if is_backward else 1
    work.thin += 2 * passes * step.tokens * plan.adapter[group]
    if is_backward:
        work.adapter_bytes += 2 * outputs + inputs + (0 if group == "down" else 2 * inputs)
    else:
        work.adapter_bytes += inputs + (0 if group == "gate_up" else 2 * outputs)


def _attention_half_bytes(step: StepShape) -> int:
    """Return the bytes that norm and rotation move."""
    s = step.sizes
    return 2 * s.x + 2 * (s.q + s.k) * (2 if _has_qk_norm(step.shape) else 1)


def _norms_after(shape: ModelShape) -> int:
    """Return how many of the two halves have a norm after them."""
    return sum(half.after is not None for half in (shape.layer.attention, shape.layer.mlp))


def _has_qk_norm(shape: ModelShape) -> bool:
    return shape.layer.qk_norm != "none"


def _add_attention(work: LayerWork, step: StepShape, factor: float, eager_bytes: int) -> None:
    """Add attention: 4 T L H K operations, half of them masked.

    `factor` is in units of a forward pass.
    """
    if step.shape.attention_softcap:
        work.eager_bytes += eager_bytes * step.sizes.scores
        return
    factor *= WIDE_HEADS if step.shape.head_dim > FLASH_HEAD else 1.0
    work.attention += factor * 2 * step.tokens * step.length * step.shape.num_heads * step.shape.head_dim
