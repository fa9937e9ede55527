"""Compute the attention half of a fused decoder layer, forward and backward.

Shape letters: T tokens, D hidden, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from engine.kernels import ops
from engine.layers.attention import attend
from engine.layers.structure import Call, Gradients, Saved, group_backward, project
from engine.planning.policies import Policy


def attention_half(x: Tensor, call: Call, saved: Saved, graph: bool) -> Tensor:
    """Return what attention adds to the residual stream, before its multiplier.

    `graph` keeps the autograd graph of attention, for the backward pass.
    """
    spec = call.spec.attention
    normed, saved.rstd["attention"] = spec.enter(x)
    qkv, saved.normed = project("qkv", normed, call, saved), normed
    saved.q, saved.k, saved.v = (part.unflatten(1, (-1, spec.head_dim)) for part in qkv.split(spec.features, dim=1))
    q, k = _rotated(call, saved)
    if graph:
        leaves = [t.detach().requires_grad_() for t in (q, k, saved.v)]
        noted = saved_tensors_hooks(partial(_noted, saved.graph), _same) if call.policy is Policy.HOST else nullcontext()
        with torch.enable_grad(), noted:
            out = attend(*leaves, call.documents, spec.options)
        saved.attention = (*leaves, out)
        out = out.detach()
    else:
        out = attend(q, k, saved.v, call.documents, spec.options)
    delta = project("o", out.reshape(x.shape[0], -1), call, saved)
    if spec.after is not None:
        saved.o_out = delta
        delta, saved.rstd["after_attention"] = spec.after.forward(delta)
    return delta


def attention_gradient(dx_mid: Tensor, call: Call, saved: Saved, grads: Gradients, wants_dx: bool) -> Tensor | None:
    """Return the gradient of x, or None if nothing below the layer is trained."""
    spec = call.spec.attention
    ddelta = spec.inner_gradient(dx_mid, saved.o_out, saved.rstd.get("after_attention"))
    *leaves, out = saved.attention
    flat_out = out.detach().reshape(ddelta.shape[0], -1)
    goes_on = wants_dx or call.groups["qkv"].is_adapted
    dout = group_backward("o", ddelta, flat_out, call, saved, grads, wants_dx=goes_on)
    if not goes_on:
        grads["qkv"] = ()
        return None
    dq, dk, dv = torch.autograd.grad(out, leaves, dout.view(out.shape))
    saved.attention = ()
    dq, dk = _unrotated(dq.contiguous(), dk.contiguous(), call, saved)
    normed = saved.normed if saved.normed is not None else spec.enter(saved.x)[0]
    dqkv = torch.cat([gradient.reshape(gradient.shape[0], -1) for gradient in (dq, dk, dv)], dim=1)
    dnormed = group_backward("qkv", dqkv, normed, call, saved, grads, wants_dx=wants_dx)
    return spec.input_gradient(dnormed, saved.x, saved.rstd["attention"], dx_mid) if wants_dx else None


def _rotated(call: Call, saved: Saved) -> tuple[Tensor, Tensor]:
    """Return queries and keys for attention: normalised, rotated and scaled as the spec says.

    What comes before the norms, or all if there are none, changes `saved` in place: the gradient
    needs only its inverse.
    """
    spec = call.spec.attention
    q, k = saved.q, saved.k
    if spec.norms_rotated:
        _rotate_(q, k, call)
    if spec.q_norm is not None:
        q, saved.rstd["q"] = spec.q_norm.forward(q)
        k, saved.rstd["k"] = spec.k_norm.forward(k)
    if not spec.norms_rotated:
        _rotate_(q, k, call)
    if call.query_factors_T is not None:
        q.mul_(call.query_factors_T.to(q.dtype)[:, None, None])
    return q, k


def _unrotated(dq: Tensor, dk: Tensor, call: Call, saved: Saved) -> tuple[Tensor, Tensor]:
    """Return the gradients of queries and keys as projected; overwrite those given."""
    spec = call.spec.attention
    if call.query_factors_T is not None:
        dq.mul_(call.query_factors_T.to(dq.dtype)[:, None, None])
    if not spec.norms_rotated:
        _rotate_(dq, dk, call, inverse=True)
    if spec.q_norm is not None:
        dq = spec.q_norm.backward(dq, saved.q, saved.rstd["q"])
        dk = spec.k_norm.backward(dk, saved.k, saved.rstd["k"])
    if spec.norms_rotated:
        _rotate_(dq, dk, call, inverse=True)
    return dq, dk


def _rotate_(q: Tensor, k: Tensor, call: Call, inverse: bool = False) -> None:
    kind = call.spec.attention.rotary
    if kind is not None:
        ops.rope_(q, k, call.cos_TR, call.sin_TR, inverse=inverse, pairs=kind == "pairs")


def _noted(graph: list[Tensor], saved: Tensor) -> Tensor:
    """Note a tensor that autograd saves, and save it detached.

    A graph that holds its own output keeps it alive until a backward pass, which may never run.
    """
    graph.append(saved.detach())
    return graph[-1]


def _same(saved: Tensor) -> Tensor:
    return saved
