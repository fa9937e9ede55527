"""A whole decoder layer as one autograd function: Llama, Mistral, Qwen2.5, Qwen3, Gemma 2 and 3.

Autograd would save every intermediate of a layer and run hundreds of small operations; here the forward pass saves what the
policy says, and the backward pass is written out. Under RECOMPUTE only the layer's input is saved, and what is recomputed stops
before the down projection, whose output no gradient needs: 5.5 instead of 6 times the matmul parameters per token.

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
from engine.projection import Projection

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Policy(Enum):
    """What a layer keeps from forward to backward."""

    KEEP = "all matmul outputs; norms, rotation and activation are recomputed"
    RECOMPUTE = "its input only"


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
    """One pass through one layer: the spec, its projections, and where tokens stand."""

    spec: LayerSpec
    policy: Policy
    projections: dict[str, Projection]
    cos_TK: Tensor
    sin_TK: Tensor
    documents: Documents


@dataclass
class Saved:
    """Intermediates between forward and backward. q, k, v are as projected; `attention` is a small autograd graph of its own."""

    x: Tensor
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    attention: tuple[Tensor, ...] = ()
    o_out: Tensor | None = None
    x_mid: Tensor | None = None
    gate: Tensor | None = None
    up: Tensor | None = None
    down_out: Tensor | None = None
    rstd: dict[str, Tensor] = field(default_factory=dict)


def decoder_layer(x_TD: Tensor, call: Call, adapters: list[Tensor]) -> Tensor:
    """The layer's output [T, D]. adapters: lora_a, lora_b of each projection that has them, in the order of PROJECTIONS."""
    if not torch.is_grad_enabled():
        return _forward(x_TD, call, Saved(x_TD), graph=False)
    return _DecoderLayer.apply(x_TD, call, *adapters)


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, call: Call, *adapters: Tensor) -> Tensor:
        saved = Saved(x_TD)
        keep = call.policy is Policy.KEEP
        y_TD = _forward(x_TD, call, saved, graph=keep)
        ctx.call, ctx.saved = call, saved if keep else Saved(x_TD)
        ctx.dtypes = [a.dtype for a in adapters]
        return y_TD

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        call, saved = ctx.call, ctx.saved
        ctx.call = ctx.saved = None  # the node outlives its backward pass, until the loss is dropped
        if saved.x_mid is None:
            _recompute(call, saved)
        wants_dx = ctx.needs_input_grad[0]
        dx_TD, grads = _backward(dy_TD.contiguous(), call, saved, wants_dx)
        ordered = [gradient for name in PROJECTIONS for gradient in grads[name]]
        return dx_TD, None, *(g.to(dtype) for g, dtype in zip(ordered, ctx.dtypes))


def _forward(x: Tensor, call: Call, saved: Saved, graph: bool) -> Tensor:
    _up_to_gate(x, call, saved, graph)
    return saved.x_mid + _down(call, saved)


def _recompute(call: Call, saved: Saved) -> None:
    """Fill `saved` again from the layer's input. The down projection runs only where a norm follows it."""
    _up_to_gate(saved.x, call, saved, graph=True)
    if call.spec.after_mlp_norm is not None:
        _down(call, saved)


def _up_to_gate(x: Tensor, call: Call, saved: Saved, graph: bool) -> None:
    """Everything up to the gate and up projections, into `saved`."""
    delta, norm = _attention_half(x, call, saved, graph), call.spec.mlp_norm
    saved.x_mid, normed, saved.rstd["mlp"] = kernels.add_rms_norm(x, delta, norm.weight, norm.eps, norm.offset)
    saved.gate, saved.up = (call.projections[name].forward(normed) for name in ("gate_proj", "up_proj"))


def _down(call: Call, saved: Saved) -> Tensor:
    """What the MLP adds to the residual stream."""
    hidden, norm = kernels.glu(saved.gate, saved.up, call.spec.activation), call.spec.after_mlp_norm
    down = call.projections["down_proj"].forward(hidden)
    if norm is not None:
        saved.down_out = down
        down, saved.rstd["after_mlp"] = norm.forward(down)
    return down


def _attention_half(x: Tensor, call: Call, saved: Saved, graph: bool) -> Tensor:
    """What attention adds to the residual stream; `graph` keeps attention's own backward."""
    spec, projections = call.spec, call.projections
    normed, saved.rstd["input"] = spec.input_norm.forward(x)
    saved.q, saved.k, saved.v = (_heads(projections[n].forward(normed), spec) for n in ("q_proj", "k_proj", "v_proj"))
    q, k = _rotated(call, saved)
    if graph:
        leaves = [t.detach().requires_grad_() for t in (q, k, saved.v)]
        with torch.enable_grad():
            out = attend(*leaves, call.documents, spec.attention)
        saved.attention = (*leaves, out)
        out = out.detach()
    else:
        out = attend(q, k, saved.v, call.documents, spec.attention)
    delta = projections["o_proj"].forward(out.reshape(x.shape[0], -1))
    if spec.after_attention_norm is not None:
        saved.o_out = delta
        delta, saved.rstd["after_attention"] = spec.after_attention_norm.forward(delta)
    return delta


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


def _backward(dy: Tensor, call: Call, saved: Saved, wants_dx: bool) -> tuple[Tensor | None, dict[str, tuple[Tensor, ...]]]:
    grads: dict[str, tuple[Tensor, ...]] = {}
    dx_mid = _mlp_backward(dy, call, saved, grads)
    return _attention_backward(dx_mid, call, saved, grads, wants_dx), grads


def _mlp_backward(dy: Tensor, call: Call, saved: Saved, grads: dict[str, tuple[Tensor, ...]]) -> Tensor:
    """Gradient of x_mid."""
    spec, projections = call.spec, call.projections
    ddown = dy
    if spec.after_mlp_norm is not None:
        ddown = spec.after_mlp_norm.backward(dy, saved.down_out, saved.rstd["after_mlp"])
        saved.down_out = None
    down = projections["down_proj"]
    dhidden = down.input_gradient(ddown)
    gate, up = saved.gate, saved.up
    saved.gate = saved.up = None
    kernels.glu_backward_(dhidden, gate, up, spec.activation)
    hidden, dgate, dup = dhidden, gate, up  # in place
    grads["down_proj"] = down.adapter_gradients(ddown, hidden)
    del hidden, dhidden
    normed, _ = spec.mlp_norm.forward(saved.x_mid)
    grads["gate_proj"] = projections["gate_proj"].adapter_gradients(dgate, normed)
    grads["up_proj"] = projections["up_proj"].adapter_gradients(dup, normed)
    dnormed = projections["gate_proj"].input_gradient(dgate)
    dnormed = projections["up_proj"].input_gradient(dup, dnormed)
    return spec.mlp_norm.backward(dnormed, saved.x_mid, saved.rstd["mlp"], residual=dy)


def _attention_backward(
    dx_mid: Tensor, call: Call, saved: Saved, grads: dict[str, tuple[Tensor, ...]], wants_dx: bool
) -> Tensor | None:
    """Gradient of x, or None where nothing below the layer is trained."""
    spec, projections = call.spec, call.projections
    ddelta = dx_mid
    if spec.after_attention_norm is not None:
        ddelta = spec.after_attention_norm.backward(dx_mid, saved.o_out, saved.rstd["after_attention"])
    *leaves, out = saved.attention
    grads["o_proj"] = projections["o_proj"].adapter_gradients(ddelta, out.detach().reshape(ddelta.shape[0], -1))
    if not wants_dx and all(projections[name].a_RD is None for name in ("q_proj", "k_proj", "v_proj")):
        grads.update({name: () for name in ("q_proj", "k_proj", "v_proj")})
        return None
    dout = projections["o_proj"].input_gradient(ddelta)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout.view(out.shape))
    saved.attention = ()
    dq, dk = dq.contiguous(), dk.contiguous()
    kernels.rope_(dq, dk, call.cos_TK, call.sin_TK, inverse=True)
    if spec.q_norm is not None:
        dq = spec.q_norm.backward(dq, saved.q, saved.rstd["q"])
        dk = spec.k_norm.backward(dk, saved.k, saved.rstd["k"])
    normed, _ = spec.input_norm.forward(saved.x)
    dnormed = None
    for name, gradient in (("q_proj", dq), ("k_proj", dk), ("v_proj", dv)):
        flat = gradient.reshape(gradient.shape[0], -1)
        grads[name] = projections[name].adapter_gradients(flat, normed)
        dnormed = projections[name].input_gradient(flat, dnormed) if wants_dx else None
    return spec.input_norm.backward(dnormed, saved.x, saved.rstd["input"], residual=dx_mid) if wants_dx else None


def _heads(x: Tensor, spec: LayerSpec) -> Tensor:
    return x.view(x.shape[0], -1, spec.head_dim)
