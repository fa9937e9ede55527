"""What a fused decoder layer is made of: its norms and spec, one call through it, what is saved, its projections by group.

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
"""Of adapters, by group."""


@dataclass(frozen=True)
class Norm:
    """RMSNorm: x / rms(x) * (offset + weight); offset is 1 in Gemma."""

    weight: Tensor
    eps: float
    offset: float

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(normalised x, reciprocal root mean square of each row), over the last dimension."""
        y, rstd = ops.rms_norm(x.reshape(-1, x.shape[-1]), self.weight, self.eps, self.offset)
        return y.view(x.shape), rstd

    def backward(self, dy: Tensor, x: Tensor, rstd: Tensor, residual: Tensor | None = None) -> Tensor:
        rows = (t.reshape(-1, t.shape[-1]) for t in (dy, x))
        extra = None if residual is None else residual.reshape(-1, residual.shape[-1])
        return ops.rms_norm_backward(*rows, self.weight, rstd, self.offset, extra).view(x.shape)


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """The norm alone, differentiable in x of any leading shape."""
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
    """What does not change between calls. Norms that a family lacks are None."""

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
    """One pass through one layer: the spec, its projections by group, where tokens stand, and where OFFLOAD puts its input."""

    spec: LayerSpec
    policy: Policy
    groups: dict[str, ProjectionGroup]
    cos_TK: Tensor
    sin_TK: Tensor
    documents: Documents
    stash: HostStash


@dataclass
class Saved:
    """Intermediates between forward and backward. x: a number of the stash under OFFLOAD and HOST. q, k, v are as projected;
    `attention` is a small autograd graph of its own, `graph` what it saved; `low` holds each group's low-rank hidden, kept under
    all policies but OFFLOAD."""

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
    normed: Tensor | None = None  # x, normalised: within one pass only

    def kept(self) -> list[Tensor]:
        """All but x and the vectors of one value a token."""
        single = (self.q, self.k, self.v, self.o_out, self.x_mid, self.gate_up, self.down_out)
        return [t for t in (*single, *self.attention, *self.graph, *self.low.values()) if t is not None]


def project(name: str, x: Tensor, call: Call, saved: Saved) -> Tensor:
    """A group's output with its adapters."""
    return call.groups[name].forward(x, low_rank_hidden(name, x, call, saved))


def low_rank_hidden(name: str, x: Tensor, call: Call, saved: Saved) -> Tensor | None:
    """A group's low-rank hidden, computed where it is not saved."""
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
    """Gradient of the group's input x, where it is wanted; its adapter gradients into `grads`."""
    group = call.groups[name]
    dlow = group.low_gradient(dy)
    grads[name] = group.adapter_gradients(dy, dlow, x, saved.low[name])
    return group.input_gradient(dy, dlow, weights) if wants_dx else None
