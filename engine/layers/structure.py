"""Define the parts of a fused decoder layer: norms, spec, call, saved tensors, projection groups.

Shape letters: T tokens, D hidden, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.kernels import ops
from engine.layers.attention import AttentionOptions, Documents
from engine.layers.host_stash import HostStash
from engine.layers.projection_group import ProjectionGroup, Weights
from engine.planning.policies import GROUPS, Policy

PROJECTIONS = tuple(name for names in GROUPS.values() for name in names)
Gradients = dict[str, tuple[Tensor, ...]]
"""Gradients of the adapters, by group."""


@dataclass(frozen=True)
class Norm:
    """RMSNorm: x / rms(x) * (offset + weight). The offset is 1 in Gemma, else 0."""

    weight: Tensor
    eps: float
    offset: float

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised x and the reciprocal root mean square of each row, [rows]."""
        y, rstd = ops.rms_norm(x.reshape(-1, x.shape[-1]), self.weight, self.eps, self.offset)
        return y.view(x.shape), rstd

    def backward(self, dy: Tensor, x: Tensor, rstd: Tensor, residual: Tensor | None = None) -> Tensor:
        rows = (t.reshape(-1, t.shape[-1]) for t in (dy, x))
        extra = None if residual is None else residual.reshape(-1, residual.shape[-1])
        return ops.rms_norm_backward(*rows, self.weight, rstd, self.offset, extra).view(x.shape)


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """Return the normalised x [..., D]. Differentiable in x."""
    return _Normalize.apply(x, norm) if torch.is_grad_enabled() else norm.forward(x)[0]


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        y, rstd = norm.forward(x)
        ctx.save_for_backward(x, rstd)
        ctx.norm = norm
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        x, rstd = ctx.saved_tensors
        return ctx.norm.backward(dy, x, rstd), None


@dataclass(frozen=True)
class LayerSpec:
    """The part of a layer that calls do not change. Norms that a family lacks are None."""

    head_dim: int
    activation: str
    attention: AttentionOptions
    input_norm: Norm
    mlp_norm: Norm
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    after_attention_norm: Norm | None = None
    after_mlp_norm: Norm | None = None


@dataclass
class Call:
    """One pass through one layer.

    `groups` are its projections. `cos_TK`, `sin_TK` and `documents` place the tokens. The policies
    on the host store in `stash`.
    """

    spec: LayerSpec
    policy: Policy
    groups: dict[str, ProjectionGroup]
    cos_TK: Tensor
    sin_TK: Tensor
    documents: Documents
    stash: HostStash


@dataclass
class Saved:
    """The intermediates between forward and backward.

    - `x` is the layer's input; under OFFLOAD and HOST it becomes its number in the stash.
    - `q`, `k`, `v` are as projected, but rotated in place if the family has no q and k norms.
    - `attention` is the small autograd graph of attention: its leaves and its output. `graph` holds
      what that graph saved.
    - `low` holds each group's low-rank hidden, which all policies but OFFLOAD keep.
    """

    x: Tensor | int
    low: dict[str, Tensor | None] = field(default_factory=dict)
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    attention: tuple[Tensor, ...] = ()
    graph: list[Tensor] = field(default_factory=list)
    o_out: Tensor | None = None
    x_mid: Tensor | None = None
    gate_up: Tensor | None = None
    down_out: Tensor | None = None
    rstd: dict[str, Tensor] = field(default_factory=dict)
    normed: Tensor | None = None  # normalised x, within one pass only

    def kept(self) -> list[Tensor]:
        """Return all tensors but x and the vectors of one value a token."""
        single = (self.q, self.k, self.v, self.o_out, self.x_mid, self.gate_up, self.down_out)
        return [t for t in (*single, *self.attention, *self.graph, *self.low.values()) if t is not None]


def project(name: str, x: Tensor, call: Call, saved: Saved) -> Tensor:
    """Return a group's output [T, O], with its adapters."""
    return call.groups[name].forward(x, low_rank_hidden(name, x, call, saved))


def low_rank_hidden(name: str, x: Tensor, call: Call, saved: Saved) -> Tensor | None:
    """Return a group's low-rank hidden [T, R]; compute and save it if it is not saved."""
    if name not in saved.low:
        saved.low[name] = call.groups[name].low(x)
    return saved.low[name]


def group_backward(
    name: str,
    dy: Tensor,
    x: Tensor,
    call: Call,
    saved: Saved,
    grads: Gradients,
    weights: Weights | None = None,
    wants_dx: bool = True,
) -> Tensor | None:
    """Set a group's adapter gradients in `grads`; return the gradient of x [T, D] if wanted."""
    group = call.groups[name]
    dlow = group.low_gradient(dy)
    grads[name] = group.adapter_gradients(dy, dlow, x, saved.low[name])
    return group.input_gradient(dy, dlow, weights) if wants_dx else None
