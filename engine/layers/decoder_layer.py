"""Compute a whole decoder layer as one autograd function.

It covers Llama, Mistral, Qwen2.5, Qwen3, Gemma 2 and 3.

Autograd would save every intermediate of a layer and run hundreds of small operations. Here the
forward pass saves what the policy says, and the backward pass is written by hand.

Recomputation stops before the down projection, because no gradient needs its output. That costs 5.5
instead of 6 times the matmul parameters a token. The gradient reuses the weights it dequantised.

Shape letters: T tokens, D hidden, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from engine.kernels import ops
from engine.layers.attention import attend
from engine.layers.mlp import mlp, mlp_gradient, tiles
from engine.layers.structure import Call, Gradients, Saved, group_backward, project
from engine.planning import compute_limits
from engine.planning.policies import GROUPS, Policy


def decoder_layer(x_TD: Tensor, call: Call, adapters: list[Tensor]) -> Tensor:
    """Return the layer's output [T, D].

    `adapters` are lora_a, lora_b of each adapted projection, in the order of PROJECTIONS.
    """
    if not (torch.is_grad_enabled() and (x_TD.requires_grad or adapters)):
        return _forward(x_TD, call, Saved(x_TD), graph=False)
    return _DecoderLayer.apply(x_TD, call, *adapters)


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, call: Call, *adapters: Tensor) -> Tensor:
        saved = Saved(x_TD)
        y_TD = _forward(x_TD, call, saved, graph=call.policy.keeps_attention)
        call.stash.advance()
        ctx.call, ctx.saved = call, _kept(saved, call)
        ctx.dtypes = [a.dtype for a in adapters]
        return y_TD

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        call, saved = ctx.call, ctx.saved
        ctx.call = ctx.saved = None  # frees memory now: the node lives until the caller drops the loss
        if call.policy.is_on_host:
            saved.x = call.stash.pop(saved.x)
        grads: Gradients = {}
        dx_mid_TD = _mlp_backward(dy_TD.contiguous(), call, saved, grads)
        saved.x_mid = None
        dx_TD = _attention_backward(dx_mid_TD, call, saved, grads, ctx.needs_input_grad[0])
        ordered = [gradient for name in GROUPS for gradient in grads[name]]
        return dx_TD, None, *(g.to(dtype) for g, dtype in zip(ordered, ctx.dtypes))


def _kept(saved: Saved, call: Call) -> Saved:
    """Return the part of a forward pass that the policy keeps."""
    policy = call.policy
    if policy is Policy.RECOMPUTE:
        return Saved(saved.x, saved.low)
    if policy is Policy.OFFLOAD:
        return Saved(call.stash.push(saved.x))
    saved.normed = None
    if not _keeps_mlp(call, saved.x.shape[0]):
        saved.gate_up = saved.down_out = None
    if policy is Policy.HOST:
        saved.x = call.stash.push(saved.x, saved.kept())
    saved.graph.clear()
    return saved


def _keeps_mlp(call: Call, num_tokens: int) -> bool:
    return call.policy is Policy.KEEP or (call.policy is Policy.HOST and num_tokens <= compute_limits.MLP_TILE_TOKENS)


def _forward(x: Tensor, call: Call, saved: Saved, graph: bool) -> Tensor:
    normed = _to_mlp(x, call, saved, graph)
    if (graph and _keeps_mlp(call, x.shape[0])) or x.shape[0] <= compute_limits.MLP_TILE_TOKENS:
        return mlp(normed, call, saved)
    y = torch.empty_like(x)
    for rows, part in tiles(call, x.shape[0]):
        y[rows] = mlp(normed[rows], part, Saved(0, x_mid=saved.x_mid[rows]))
    return y


def _to_mlp(x: Tensor, call: Call, saved: Saved, graph: bool) -> Tensor:
    """Return the MLP's normalised input, and set `saved.x_mid`."""
    delta, norm = _attention_half(x, call, saved, graph), call.spec.mlp_norm
    saved.x_mid, normed, saved.rstd["mlp"] = ops.add_rms_norm(x, delta, norm.weight, norm.eps, norm.offset)
    return normed


def _attention_half(x: Tensor, call: Call, saved: Saved, graph: bool) -> Tensor:
    """Return what attention adds to the residual stream.

    `graph` keeps the autograd graph of attention, for the backward pass.
    """
    spec = call.spec
    normed, saved.rstd["input"] = spec.input_norm.forward(x)
    qkv, saved.normed = project("qkv", normed, call, saved), normed
    saved.q, saved.k, saved.v = (qkv[:, part].unflatten(1, (-1, spec.head_dim)) for part in call.groups["qkv"].outputs)
    q, k = _rotated(call, saved)
    if graph:
        leaves = [t.detach().requires_grad_() for t in (q, k, saved.v)]
        noted = saved_tensors_hooks(partial(_noted, saved.graph), _same) if call.policy is Policy.HOST else nullcontext()
        with torch.enable_grad(), noted:
            out = attend(*leaves, call.documents, spec.attention)
        saved.attention = (*leaves, out)
        out = out.detach()
    else:
        out = attend(q, k, saved.v, call.documents, spec.attention)
    delta = project("o", out.reshape(x.shape[0], -1), call, saved)
    if spec.after_attention_norm is not None:
        saved.o_out = delta
        delta, saved.rstd["after_attention"] = spec.after_attention_norm.forward(delta)
    return delta


def _noted(graph: list[Tensor], saved: Tensor) -> Tensor:
    """Note a tensor that autograd saves, and save it detached.

    A graph that holds its own output keeps it alive until a backward pass, which may never run.
    """
    graph.append(saved.detach())
    return graph[-1]


def _same(saved: Tensor) -> Tensor:
    return saved


def _rotated(call: Call, saved: Saved) -> tuple[Tensor, Tensor]:
    """Return queries and keys, rotated, and normalised first if the family has q and k norms.

    Without norms this rotates `saved` in place: the gradient needs only the inverse rotation.
    """
    spec = call.spec
    q, k = saved.q, saved.k
    if spec.q_norm is not None:
        q, saved.rstd["q"] = spec.q_norm.forward(q)
        k, saved.rstd["k"] = spec.k_norm.forward(k)
    ops.rope_(q, k, call.cos_TK, call.sin_TK)
    return q, k


def _mlp_backward(dy: Tensor, call: Call, saved: Saved, grads: Gradients) -> Tensor:
    """Return the gradient of x_mid; first compute again what the policy has dropped."""
    norm = call.spec.mlp_norm
    normed = _to_mlp(saved.x, call, saved, graph=True) if saved.x_mid is None else norm.forward(saved.x_mid)[0]
    if saved.gate_up is not None or dy.shape[0] <= compute_limits.MLP_TILE_TOKENS:
        return mlp_gradient(dy, normed, call, saved, grads)
    dx_mid = torch.empty_like(dy)
    for rows, part in tiles(call, dy.shape[0]):
        tile, tile_grads = Saved(0, x_mid=saved.x_mid[rows], rstd={"mlp": saved.rstd["mlp"][rows]}), {}
        dx_mid[rows] = mlp_gradient(dy[rows], normed[rows], part, tile, tile_grads)
        for name, more in tile_grads.items():
            grads[name] = tuple(a.add_(b) for a, b in zip(grads[name], more)) if name in grads else more
    return dx_mid


def _attention_backward(dx_mid: Tensor, call: Call, saved: Saved, grads: Gradients, wants_dx: bool) -> Tensor | None:
    """Return the gradient of x, or None if nothing below the layer is trained."""
    spec = call.spec
    ddelta = dx_mid
    if spec.after_attention_norm is not None:
        ddelta = spec.after_attention_norm.backward(dx_mid, saved.o_out, saved.rstd["after_attention"])
    *leaves, out = saved.attention
    flat_out = out.detach().reshape(ddelta.shape[0], -1)
    goes_on = wants_dx or call.groups["qkv"].is_adapted
    dout = group_backward("o", ddelta, flat_out, call, saved, grads, wants_dx=goes_on)
    if not goes_on:
        grads["qkv"] = ()
        return None
    dq, dk, dv = torch.autograd.grad(out, leaves, dout.view(out.shape))
    saved.attention = ()
    dq, dk = dq.contiguous(), dk.contiguous()
    ops.rope_(dq, dk, call.cos_TK, call.sin_TK, inverse=True)
    if spec.q_norm is not None:
        dq = spec.q_norm.backward(dq, saved.q, saved.rstd["q"])
        dk = spec.k_norm.backward(dk, saved.k, saved.rstd["k"])
    normed = saved.normed if saved.normed is not None else spec.input_norm.forward(saved.x)[0]
    dqkv = torch.cat([gradient.reshape(gradient.shape[0], -1) for gradient in (dq, dk, dv)], dim=1)
    dnormed = group_backward("qkv", dqkv, normed, call, saved, grads, wants_dx=wants_dx)
    return spec.input_norm.backward(dnormed, saved.x, saved.rstd["input"], residual=dx_mid) if wants_dx else None
