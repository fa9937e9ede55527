"""A whole decoder layer as one autograd function: Llama, Mistral, Qwen2.5, Qwen3, Gemma 2 and 3.

Autograd would save every intermediate of a layer and run hundreds of small operations; here the forward pass saves what the
policy says, and the backward pass is written out. What is recomputed stops before the down projection, whose output no gradient
needs: 5.5 instead of 6 times the matmul parameters per token; weights that are dequantised for it serve the gradient too.

Shape letters: T tokens, D hidden, F MLP hidden, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from engine import kernels
from engine.attention import AttentionOptions, Documents, attend
from engine.offload import HostStash
from engine.projection import ProjectionGroup, Weights

GROUPS = {"qkv": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",), "gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
PROJECTIONS = tuple(name for names in GROUPS.values() for name in names)


class Policy(Enum):
    """What a layer keeps from forward to backward."""

    KEEP = "all matmul outputs; norms, rotation and activation are recomputed"
    SELECTIVE = "its input and all of attention; the MLP is recomputed"
    RECOMPUTE = "its input only"
    OFFLOAD = "its input only, in host memory"


@dataclass(frozen=True)
class Norm:
    """RMSNorm: x / rms(x) * (offset + weight); offset is 1 in Gemma."""

    weight: Tensor
    eps: float
    offset: float

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(normalised x, reciprocal root mean square of each row), over the last dimension."""
        y, rstd = kernels.rms_norm(x.reshape(-1, x.shape[-1]), self.weight, self.eps, self.offset)
        return y.view(x.shape), rstd

    def backward(self, dy: Tensor, x: Tensor, rstd: Tensor, residual: Tensor | None = None) -> Tensor:
        rows = (t.reshape(-1, t.shape[-1]) for t in (dy, x))
        extra = None if residual is None else residual.reshape(-1, residual.shape[-1])
        return kernels.rms_norm_backward(*rows, self.weight, rstd, self.offset, extra).view(x.shape)


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
    """Intermediates between forward and backward. x: a number of the stash under OFFLOAD. q, k, v are as projected; `attention`
    is a small autograd graph of its own; `low` holds each group's low-rank hidden, kept under all policies but OFFLOAD."""

    x: Tensor | int
    low: dict[str, Tensor | None] = field(default_factory=dict)
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    attention: tuple[Tensor, ...] = ()
    o_out: Tensor | None = None
    x_mid: Tensor | None = None
    gate_up: Tensor | None = None
    down_out: Tensor | None = None
    rstd: dict[str, Tensor] = field(default_factory=dict)
    normed: Tensor | None = None  # x, normalised: within one pass only


def decoder_layer(x_TD: Tensor, call: Call, adapters: list[Tensor]) -> Tensor:
    """The layer's output [T, D]. adapters: lora_a, lora_b of each projection that has them, in the order of PROJECTIONS."""
    if not torch.is_grad_enabled():
        return _forward(x_TD, call, Saved(x_TD), graph=False)
    return _DecoderLayer.apply(x_TD, call, *adapters)


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, call: Call, *adapters: Tensor) -> Tensor:
        saved = Saved(x_TD)
        y_TD = _forward(x_TD, call, saved, graph=call.policy in (Policy.KEEP, Policy.SELECTIVE))
        if call.policy is Policy.RECOMPUTE:
            saved = Saved(x_TD, saved.low)
        elif call.policy is Policy.OFFLOAD:
            saved = Saved(call.stash.push(x_TD))
        elif call.policy is Policy.SELECTIVE:
            saved.gate_up = saved.down_out = None
        saved.normed = None
        ctx.call, ctx.saved = call, saved
        ctx.dtypes = [a.dtype for a in adapters]
        return y_TD

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        call, saved = ctx.call, ctx.saved
        ctx.call = ctx.saved = None  # the node outlives its backward pass, until the loss is dropped
        if call.policy is Policy.OFFLOAD:
            saved.x = call.stash.pop(saved.x)
        grads: dict[str, tuple[Tensor, ...]] = {}
        dx_mid_TD = _mlp_backward(dy_TD.contiguous(), call, saved, grads)
        dx_TD = _attention_backward(dx_mid_TD, call, saved, grads, ctx.needs_input_grad[0])
        ordered = [gradient for name in GROUPS for gradient in grads[name]]
        return dx_TD, None, *(g.to(dtype) for g, dtype in zip(ordered, ctx.dtypes))


def _forward(x: Tensor, call: Call, saved: Saved, graph: bool) -> Tensor:
    delta, norm = _attention_half(x, call, saved, graph), call.spec.mlp_norm
    saved.x_mid, normed, saved.rstd["mlp"] = kernels.add_rms_norm(x, delta, norm.weight, norm.eps, norm.offset)
    saved.gate_up = call.groups["gate_up"].bare(normed)
    _low("gate_up", normed, call, saved)
    del normed, delta
    return _down(call, saved).add_(saved.x_mid)


def _attention_half(x: Tensor, call: Call, saved: Saved, graph: bool) -> Tensor:
    """What attention adds to the residual stream; `graph` keeps attention's own backward."""
    spec = call.spec
    normed, saved.rstd["input"] = spec.input_norm.forward(x)
    qkv, saved.normed = _project("qkv", normed, call, saved), normed
    saved.q, saved.k, saved.v = (qkv[:, part].unflatten(1, (-1, spec.head_dim)) for part in call.groups["qkv"].outputs)
    q, k = _rotated(call, saved)
    if graph:
        leaves = [t.detach().requires_grad_() for t in (q, k, saved.v)]
        with torch.enable_grad():
            out = attend(*leaves, call.documents, spec.attention)
        saved.attention = (*leaves, out)
        out = out.detach()
    else:
        out = attend(q, k, saved.v, call.documents, spec.attention)
    delta = _project("o", out.reshape(x.shape[0], -1), call, saved)
    if spec.after_attention_norm is not None:
        saved.o_out = delta
        delta, saved.rstd["after_attention"] = spec.after_attention_norm.forward(delta)
    return delta


def _down(call: Call, saved: Saved) -> Tensor:
    """What the MLP adds to the residual stream, a fresh tensor."""
    norm = call.spec.after_mlp_norm
    down = _project("down", kernels.glu(*_halves(saved.gate_up), call.spec.activation, *_gate_up_terms(call, saved)), call, saved)
    if norm is not None:
        saved.down_out = down
        down, saved.rstd["after_mlp"] = norm.forward(down)
    return down


def _project(name: str, x: Tensor, call: Call, saved: Saved) -> Tensor:
    """A group's output with its adapters."""
    return call.groups[name].forward(x, _low(name, x, call, saved))


def _low(name: str, x: Tensor, call: Call, saved: Saved) -> Tensor | None:
    """A group's low-rank hidden, computed where it is not saved."""
    if name not in saved.low:
        saved.low[name] = call.groups[name].low(x)
    return saved.low[name]


def _halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return gate_up.chunk(2, dim=1)


def _gate_up_terms(call: Call, saved: Saved) -> list[kernels.LowRank | None]:
    """The adapters' part of gate and up, which the activation's kernels add."""
    return call.groups["gate_up"].terms(saved.low["gate_up"])


def _rotated(call: Call, saved: Saved) -> tuple[Tensor, Tensor]:
    """Queries and keys, normalised where the family does so, and rotated. Without norms this is done in place: the rotation of
    what is saved is undone by the rotation of its gradient."""
    spec = call.spec
    q, k = saved.q, saved.k
    if spec.q_norm is not None:
        q, saved.rstd["q"] = spec.q_norm.forward(q)
        k, saved.rstd["k"] = spec.k_norm.forward(k)
    kernels.rope_(q, k, call.cos_TK, call.sin_TK)
    return q, k


def _mlp_backward(dy: Tensor, call: Call, saved: Saved, grads: dict[str, tuple[Tensor, ...]]) -> Tensor:
    """Gradient of x_mid. What the policy has dropped is computed again first."""
    spec, group = call.spec, call.groups["gate_up"]
    if saved.x_mid is None:
        delta, norm = _attention_half(saved.x, call, saved, graph=True), spec.mlp_norm
        saved.x_mid, normed, saved.rstd["mlp"] = kernels.add_rms_norm(saved.x, delta, norm.weight, norm.eps, norm.offset)
        del delta
    else:
        normed, _ = spec.mlp_norm.forward(saved.x_mid)
    weights = group.weights(dy.dtype)
    if saved.gate_up is None:
        saved.gate_up = group.bare(normed, weights)
        _low("gate_up", normed, call, saved)
        if spec.after_mlp_norm is not None:
            _down(call, saved)
    ddown = dy
    if spec.after_mlp_norm is not None:
        ddown = spec.after_mlp_norm.backward(dy, saved.down_out, saved.rstd["after_mlp"])
        saved.down_out = None
    dgate_up = _activation_backward(ddown, call, saved, grads)
    dnormed = _group_backward("gate_up", dgate_up, normed, call, saved, grads, weights)
    return spec.mlp_norm.backward(dnormed, saved.x_mid, saved.rstd["mlp"], residual=dy)


def _activation_backward(ddown: Tensor, call: Call, saved: Saved, grads: dict[str, tuple[Tensor, ...]]) -> Tensor:
    """Gradient of gate | up, in the place of their values; the down projection's adapter gradients on the way."""
    group = call.groups["down"]
    dlow = group.low_gradient(ddown)
    if group.dropout and dlow is not None:
        dhidden, term = group.input_gradient(ddown, dlow), None
    else:
        dhidden, term = group.bare_input_gradient(ddown), group.input_term(dlow)
    gate_up, saved.gate_up = saved.gate_up, None
    kernels.glu_backward_(dhidden, *_halves(gate_up), call.spec.activation, *_gate_up_terms(call, saved), term)
    hidden = dhidden  # in place
    grads["down"] = group.adapter_gradients(ddown, dlow, hidden, _low("down", hidden, call, saved))
    return gate_up


def _group_backward(
    name: str, dy: Tensor, x: Tensor, call: Call, saved: Saved, grads: dict[str, tuple[Tensor, ...]], weights: Weights | None
) -> Tensor:
    """Gradient of the group's input x; its adapter gradients into `grads`."""
    group = call.groups[name]
    dlow = group.low_gradient(dy)
    grads[name] = group.adapter_gradients(dy, dlow, x, saved.low[name])
    return group.input_gradient(dy, dlow, weights)


def _attention_backward(
    dx_mid: Tensor, call: Call, saved: Saved, grads: dict[str, tuple[Tensor, ...]], wants_dx: bool
) -> Tensor | None:
    """Gradient of x, or None where nothing below the layer is trained."""
    spec, qkv = call.spec, call.groups["qkv"]
    ddelta = dx_mid
    if spec.after_attention_norm is not None:
        ddelta = spec.after_attention_norm.backward(dx_mid, saved.o_out, saved.rstd["after_attention"])
    *leaves, out = saved.attention
    flat_out = out.detach().reshape(ddelta.shape[0], -1)
    if not wants_dx and not qkv.is_adapted:
        o = call.groups["o"]
        grads["o"], grads["qkv"] = o.adapter_gradients(ddelta, o.low_gradient(ddelta), flat_out, saved.low["o"]), ()
        return None
    dout = _group_backward("o", ddelta, flat_out, call, saved, grads, None)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout.view(out.shape))
    saved.attention = ()
    dq, dk = dq.contiguous(), dk.contiguous()
    kernels.rope_(dq, dk, call.cos_TK, call.sin_TK, inverse=True)
    if spec.q_norm is not None:
        dq = spec.q_norm.backward(dq, saved.q, saved.rstd["q"])
        dk = spec.k_norm.backward(dk, saved.k, saved.rstd["k"])
    normed = saved.normed if saved.normed is not None else spec.input_norm.forward(saved.x)[0]
    dqkv = torch.cat([gradient.reshape(gradient.shape[0], -1) for gradient in (dq, dk, dv)], dim=1)
    if not wants_dx:
        grads["qkv"] = qkv.adapter_gradients(dqkv, qkv.low_gradient(dqkv), normed, saved.low["qkv"])
        return None
    dnormed = _group_backward("qkv", dqkv, normed, call, saved, grads, None)
    return spec.input_norm.backward(dnormed, saved.x, saved.rstd["input"], residual=dx_mid)
