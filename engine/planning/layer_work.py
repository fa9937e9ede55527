"""Count the arithmetic and the bytes of one layer's forward and backward pass. No torch.

engine/planning/speed.py makes times of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from engine.config.matmul import Matmul
from engine.config.targets import EXPERTS
from engine.memory.layer_walk import attention_name
from engine.memory.tensor_sizes import Sizes
from engine.planning.cards import Card
from engine.planning.rates import CODE_BYTES, PLAIN_BYTES
from engine.shape.compute_limits import FLASH_HEAD
from engine.shape.experts_shape import MIN_ROWS, ROUTER, SHARED
from engine.shape.families import INPUT_GATE, INPUT_PROJECTION
from engine.shape.layer_plan import LayerPlan, kept_name
from engine.shape.mixer_shape import CHUNK, MIXER
from engine.shape.model_shape import ModelShape
from engine.shape.policies import Policy

# Flash attention's backward pass reaches this share of its forward pass's speed (H100).
ATTENTION_BACKWARD = 0.89
# Time of our own attention in units of what the rates in speed.py say, forward and backward: with a
# softcap, and over heads wider than flash attention takes (H100, heads of 256 and 512, samples of
# 1,024 and 4,096 tokens). The second number of heads wider than 256 is that of scores made again.
TILED, WIDE_TILED = (1.0, 0.93), (1.5, 3.7)
# In fp32, attention with a softcap is plain matrix operations: bytes a score, forward and backward.
# An estimate.
EAGER_BYTES = (60, 110)
# A library's mixer moves what its graph holds this many times, forward and backward. Its torch
# operations walk over chunks: a backward pass launches this many times what a forward pass does. An
# estimate.
MIXER_PASSES, MIXER_BACKWARD = (2.0, 4.0), 2.5
ALONG_BYTES = 8  # a weight's own gradient, written and read in fp32


@dataclass
class LayerWork:
    """The work of one layer's pass.

    `matmul`, `int8_matmul`, `thin` (adapters) and `attention` are operations; the others are bytes, by
    what moves them. INT8 codes: `forward_code_bytes` and `backward_code_bytes` are of weights that become
    codes for a pass, `row_bytes` of activations.
    `mixer_chunks` are passes over a chunk that a library's mixer launches one by one.
    """

    matmul: float = 0.0
    int8_matmul: float = 0.0
    thin: float = 0.0
    attention: float = 0.0
    adapter_bytes: float = 0.0
    plain_bytes: float = 0.0
    activation_bytes: float = 0.0
    nf4_bytes: float = 0.0
    forward_code_bytes: float = 0.0
    backward_code_bytes: float = 0.0
    row_bytes: float = 0.0
    eager_bytes: float = 0.0
    mixer_bytes: float = 0.0
    mixer_chunks: float = 0.0

# Experts (H100, shapes of Qwen3-30B-A3B and gpt-oss-20b, 2,048 tokens, within 17 % of four times): the speed of
# grouped products next to a dense one. Kernels that dequantise in tiles of this many rows take the time of
# that many bytes for each weight of a tile. Other cards are extrapolated.
GROUPED_SPEED, GROUPED_ROWS, TILE_BYTES = 0.5, 64, 1.8
UP_SHARE = 2 / 3  # of an expert's weights that fused layers multiply by again: gate and up


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
    work.plain_bytes = 4 * s.x + 3 * s.x + 2 * s.x * _norms_after(step.shape)
    _add_activation(work, plan, _gated(step))
    _add_first_half(work, step)
    if step.shape.experts is not None:
        _add_experts(work, plan, step, 1, gradients=False)
    return work


def _add_activation(work: LayerWork, plan: LayerPlan, num_bytes: int) -> None:
    """Add what the gated activation moves. Without low-rank terms, which products in INT8 have added, it is as fast as a norm."""
    if plan.matmul.is_int8_forward:
        work.plain_bytes += num_bytes
    else:
        work.activation_bytes += num_bytes


def _gated(step: StepShape) -> int:
    """Return the bytes of gate, up and their product: of the MLP, or of a shared expert in its place."""
    s, experts = step.sizes, step.shape.experts
    return s.gate_up + s.f if experts is None or experts.beside_mlp else 3 * s.low * experts.shared


def _add_first_half(work: LayerWork, step: StepShape) -> None:
    """Add a forward pass of attention or mixer, without its matmuls."""
    work.plain_bytes += _attention_half_bytes(step)
    if step.shape.mixer is None:
        _add_attention(work, step, 1.0, 0)
    else:
        _add_mixer(work, step, MIXER_PASSES[0], 1.0)


def backward_work(plan: LayerPlan, step: StepShape) -> LayerWork:
    """Return the work of a backward pass, with the recomputation before it.

    Recomputation stops before the down projection, and dequantises gate and up only once.
    """
    work, s, shape = LayerWork(), step.sizes, step.shape
    if not plan.trained:
        return work
    for group in shape.groups:
        if group not in ("qkv", MIXER) or plan.needs_dx:
            _add_matmul(work, group, plan, step, is_backward=True)
    norms = 2 * s.x + 4 * s.x + 4 * s.x + 4 * s.x * _norms_after(shape)
    norms += 4 * s.x if shape.layer.multiplier else 0
    work.plain_bytes = norms
    _add_activation(work, plan, 2 * _gated(step))
    if shape.mixer is not None:
        _add_mixer(work, step, MIXER_PASSES[1], MIXER_BACKWARD)
        if plan.policy not in (Policy.KEEP, Policy.SELECTIVE):
            _add_matmul(work, MIXER, plan, step)
            _add_first_half(work, step)
        return _with_mlp_again(work, plan, step)
    work.plain_bytes += 2 * (s.q + s.k) + 2 * s.qkv + (3 * (s.q + s.k) if _has_qk_norm(shape) else 0)
    _add_attention(work, step, 2.5, 1)
    output_alone = plan.policy is Policy.HOST and s.tile is not None
    if not plan.policy.keeps_attention or output_alone:
        for group in ("qkv", "o"):
            _add_matmul(work, group, plan, step)
        work.plain_bytes += _attention_half_bytes(step) + 4 * s.x
    if not plan.policy.keeps_attention:
        _add_attention(work, step, ATTENTION_BACKWARD, 0)  # at the speed of a forward pass
    return _with_mlp_again(work, plan, step)


def _with_mlp_again(work: LayerWork, plan: LayerPlan, step: StepShape) -> LayerWork:
    """Add what the policy computes again of the MLP."""
    s = step.sizes
    if step.shape.experts is not None:
        again = 0.0 if plan.policy is Policy.KEEP else UP_SHARE if step.is_fused else 1.0
        _add_experts(work, plan, step, 1 + again, gradients=True)
        for group in step.shape.groups if again else ():
            if group not in ("qkv", "o", MIXER):  # of a shared expert, or of the MLP beside them
                _add_matmul(work, group, plan, step)
        _add_activation(work, plan, _gated(step) if again else 0)
        return work
    if plan.policy is not Policy.KEEP and (plan.policy is not Policy.HOST or s.tile is not None):
        _add_product(work, "gate_up", plan, step)
        is_extra = plan.matmul is Matmul.INT8_BACKWARD and step.is_packed and "gate_up" not in plan.cached
        work.nf4_bytes += PLAIN_BYTES * step.parameters["gate_up"] if is_extra else 0.0  # the gradient reads codes
        if not step.is_fused or step.shape.layer.mlp.after:
            _add_matmul(work, "down", plan, step)
            _add_activation(work, plan, s.gate_up + s.f)
    return work


def _add_matmul(work: LayerWork, group: str, plan: LayerPlan, step: StepShape, is_backward: bool = False) -> None:
    """Add the matmuls of one group with its adapters.

    Products in INT8 add the low-rank terms themselves. Else the activation kernels add those of gate,
    up and the down projection's gradient.
    """
    _add_product(work, group, plan, step, is_backward)
    if step.is_packed and group not in plan.cached and not _is_int8(plan, is_backward):
        work.nf4_bytes += PLAIN_BYTES * step.parameters[group]
    if not plan.ranks[group]:
        return
    if plan.dora and group not in (MIXER, SHARED):
        _add_gains(work, group, plan, step, is_backward)
    inputs, outputs = _io(group, step)
    passes = 2 if is_backward else 1
    work.thin += 2 * passes * step.tokens * plan.adapter[group]
    is_added = _is_int8(plan, is_backward) or group == ("down" if is_backward else "gate_up")
    if is_backward:
        work.adapter_bytes += 2 * outputs + inputs + (0 if is_added else 2 * inputs)
    else:
        work.adapter_bytes += inputs + (0 if is_added else 2 * outputs)


def _add_experts(work: LayerWork, plan: LayerPlan, step: StepShape, passes: float, gradients: bool) -> None:
    """Add `passes` over a layer's experts: products, dequantisation inside them, adapters and moved rows.

    All are dequantised once a pass if the weight cache has room for that, else those that are hit, once
    for each row tile. passes: products with all weights, one of them the input gradient. gradients: of
    the adapters too.
    """
    experts, hidden = step.shape.experts, step.shape.hidden_size
    rows, element = experts.active * step.tokens, step.sizes.element
    work.matmul += passes * 2 * step.tokens * experts.active_parameters(hidden) / GROUPED_SPEED
    hit = experts.hit(step.tokens)
    tiles = (rows / hit / GROUPED_ROWS + 0.5) * hit / experts.number
    is_dense = EXPERTS in plan.cached and step.card.has_grouped_products and rows >= MIN_ROWS * experts.number
    work.nf4_bytes += passes * (PLAIN_BYTES if is_dense else tiles * TILE_BYTES) * experts.parameters(hidden)
    work.activation_bytes += passes * element * rows * (2 * hidden + 6 * experts.width)
    if plan.ranks[EXPERTS]:
        share = experts.active / experts.number
        work.thin += 2 * (passes + gradients) * step.tokens * share * plan.adapter[EXPERTS]
        work.adapter_bytes += (passes + gradients) * element * rows * (2 * hidden + 3 * experts.width)
        work.adapter_bytes += (4 if gradients else 1) * element * plan.adapter[EXPERTS]


def _add_gains(work: LayerWork, group: str, plan: LayerPlan, step: StepShape, is_backward: bool) -> None:
    """Add what DoRA does with the weights of one group.

    They get their gains where they are dequantised, or else at each use; under dropout that is a product
    of its own. The magnitudes' gradient takes one more product, in fp32, and its sums with the weights.
    """
    number, again = step.parameters[group], PLAIN_BYTES if step.is_packed else 0.0
    work.nf4_bytes += 0.0 if step.is_packed and group not in plan.cached else 4 * number
    if plan.drops:
        work.matmul += 2 * step.tokens * number
        work.nf4_bytes += again * number
    if is_backward:
        work.matmul += 2 * step.tokens * number
        work.nf4_bytes += (again + ALONG_BYTES) * number


def _add_product(work: LayerWork, group: str, plan: LayerPlan, step: StepShape, is_backward: bool = False) -> None:
    """Add the product with the frozen weights; in INT8 with the making of both operands' codes."""
    number = step.parameters[group]
    if not _is_int8(plan, is_backward):
        work.matmul += 2 * step.tokens * number
        return
    work.int8_matmul += 2 * step.tokens * number
    is_written = is_backward and group == "gate_up" and plan.matmul.is_int8_forward  # with dy
    work.row_bytes += (0.5 if is_written else 1.5) * _io(group, step)[is_backward]
    if kept_name(group, "backward" if is_backward else "forward") in plan.cached:
        return
    if is_backward:
        work.backward_code_bytes += CODE_BYTES * number
    else:
        work.forward_code_bytes += CODE_BYTES * number


def _is_int8(plan: LayerPlan, is_backward: bool) -> bool:
    return plan.matmul.is_int8_backward if is_backward else plan.matmul.is_int8_forward


def _io(group: str, step: StepShape) -> tuple[int, int]:
    """Return the bytes of a group's inputs and outputs."""
    s = step.sizes
    if group in (MIXER, SHARED, ROUTER):  # each layer reads its own input
        features = [step.shape.projections()[name] for name in step.shape.groups[group]]
        return s.low * sum(inputs for _, inputs in features), s.low * sum(outputs for outputs, _ in features)
    return {
        "qkv": (s.x, s.qkv), "o": (s.q, s.x), "gate_up": (s.x, s.gate_up), "down": (s.f, s.x),
        INPUT_GATE: (s.x, s.p), INPUT_PROJECTION: (s.p, s.x),
    }[group]  # fmt: skip


def _attention_half_bytes(step: StepShape) -> int:
    """Return the bytes that norm and rotation move."""
    s = step.sizes
    if step.shape.mixer is not None:
        return 2 * s.x
    return 2 * s.x + 2 * (s.q + s.k) * (2 if _has_qk_norm(step.shape) else 1)


def _norms_after(shape: ModelShape) -> int:
    """Return how many of the two halves have a norm after them."""
    return sum(half.after is not None for half in (shape.layer.attention, shape.layer.mlp))


def _has_qk_norm(shape: ModelShape) -> bool:
    return shape.layer.qk_norm != "none"


def _add_mixer(work: LayerWork, step: StepShape, passes: float, launches: float) -> None:
    """Add `passes` over what the mixer's graph holds; torch operations launch each chunk by itself."""
    work.mixer_bytes += passes * step.sizes.mixer.graph
    if not step.shape.mixer.has_kernels:
        work.mixer_chunks += launches * math.ceil(step.tokens / CHUNK)


def _add_attention(work: LayerWork, step: StepShape, factor: float, which: Literal[0, 1]) -> None:
    """Add attention: 4 T L H K operations, half of them masked.

    `factor` is in units of a forward pass. which: 0 for a forward pass, 1 for a backward pass.
    """
    name = attention_name(step.shape, step.sizes.element, "flash")
    if name == "eager":
        work.eager_bytes += EAGER_BYTES[which] * step.sizes.scores
        return
    if name == "tiled":
        factor *= (WIDE_TILED if step.shape.head_dim > FLASH_HEAD else TILED)[which]
    work.attention += factor * 2 * step.tokens * step.length * step.shape.num_heads * step.shape.head_dim
