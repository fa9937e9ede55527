"""Compute a whole decoder layer as one autograd function.

A layer is an attention half (attention_half.py), or one with the library's own mixer
(library/mixer_half.py), and an MLP half with a tail (mlp.py), or one with the library's router and
experts (library/experts_half.py). Its spec says what each is made of, so the families in
engine/shape/families.py share this code.

Autograd would save every intermediate of a layer and run hundreds of small operations. Here the
forward pass saves what the policy says, and the backward pass is written by hand.

Recomputation stops before the down projection, because no gradient needs its output. That costs 5.5
instead of 6 times the matmul parameters a token. The gradient reuses the weights it dequantised.

Shape letters: T tokens, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.kernels import ops
from engine.layers.attention_half import attention_gradient, attention_half, without_inputs
from engine.layers.library.experts_half import experts_gradient, experts_half
from engine.layers.library.mixer_half import mixer_gradient, mixer_half
from engine.layers.mlp import mlp, mlp_gradient, tiles
from engine.layers.structure import Call, Gradients, Saved
from engine.shape import compute_limits
from engine.shape.policies import Policy


def decoder_layer(x_TD: Tensor, call: Call, adapters: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the layer's output [T, D], then keys and values [T, G, K] if later layers read them.

    `adapters` are lora_a, lora_b and DoRA's magnitude of each adapted projection: the mixer's, then in the order of the
    call's groups, then those of the block of experts.
    """
    inputs = (*(call.shared or (None, None)), call.input_TP)
    differentiable = adapters or any(t is not None and t.requires_grad for t in (x_TD, *inputs))
    if not (torch.is_grad_enabled() and differentiable):
        saved = Saved(x_TD)
        return _forward(x_TD, call, saved, graph=False), *saved.stored
    return _DecoderLayer.apply(x_TD, call, *inputs, *adapters)


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, call: Call, k: Tensor | None, v: Tensor | None, input_TP: Tensor | None, *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        saved = Saved(x_TD)
        y_TD = _forward(x_TD, call, saved, graph=call.policy.keeps_attention)
        stored = tuple(t.detach() for t in saved.stored)  # what the node returns would hold the node itself
        call.stash.advance()
        ctx.call, ctx.saved = call, _kept(saved, call)
        ctx.dtypes = [a.dtype for a in adapters]
        return y_TD, *stored

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor, *dstored: Tensor) -> tuple[Tensor | None, ...]:
        call, saved = ctx.call, ctx.saved
        ctx.call = ctx.saved = None  # frees memory now: the node lives until the caller drops the loss
        if call.policy.is_on_host:
            saved.x = call.stash.pop(saved.x)
        if ctx.needs_input_grad[4]:
            saved.dinput = torch.empty_like(call.input_TP)
        grads: Gradients = {}
        dx_mid_TD = _mlp_backward(dy_TD.contiguous(), call, saved, grads)
        saved.x_mid = None
        if call.mixer is None:
            dx_TD = attention_gradient(dx_mid_TD, call, saved, grads, ctx.needs_input_grad[0], dstored)
        else:
            dx_TD = mixer_gradient(dx_mid_TD, call, saved, grads, ctx.needs_input_grad[0])
        inputs = *grads.get("shared", (None, None)), saved.dinput
        ordered = [gradient for name in call.ordered for gradient in grads[name]]
        return dx_TD, None, *inputs, *(g.to(dtype) for g, dtype in zip(ordered, ctx.dtypes))


def _kept(saved: Saved, call: Call) -> Saved:
    """Return the part of a forward pass that the policy keeps."""
    policy = call.policy
    if policy is Policy.RECOMPUTE:
        return Saved(saved.x, saved.low)
    if policy is Policy.OFFLOAD:
        return Saved(call.stash.push(saved.x))
    if policy is Policy.HOST and call.mixer is None and not _keeps_mlp(call, saved.x.shape[0]):
        lean = without_inputs(saved)
        lean.x = call.stash.push(lean.x, lean.kept())
        lean.graph.clear()
        return lean
    saved.normed = None
    if not _keeps_mlp(call, saved.x.shape[0]):
        saved.gate_up = saved.tail_gate = saved.down_out = None
        saved.block = ()
    if policy is Policy.HOST:
        saved.x = call.stash.push(saved.x, saved.kept(), stays=(*saved.stored, *call.shared))
    saved.stored = ()
    saved.graph.clear()
    return saved


def _keeps_mlp(call: Call, num_tokens: int) -> bool:
    """Return True if the MLP half is kept. Tensors of a block may belong to the library: they never leave the device."""
    on_host = call.policy is Policy.HOST and num_tokens <= compute_limits.MLP_TILE_TOKENS and call.block is None
    return call.policy is Policy.KEEP or on_host


def _forward(x: Tensor, call: Call, saved: Saved, graph: bool) -> Tensor:
    normed = _to_mlp(x, call, saved, graph)
    if call.block is not None:
        return experts_half(normed, call, saved, graph and _keeps_mlp(call, x.shape[0]))
    if (graph and _keeps_mlp(call, x.shape[0])) or x.shape[0] <= compute_limits.MLP_TILE_TOKENS:
        return mlp(normed, call, saved)
    y = torch.empty_like(x)
    for rows, part in tiles(call, x.shape[0], backward=False):
        y[rows] = mlp(normed[rows], part, Saved(0, x_mid=saved.x_mid[rows]))
    return y


def _to_mlp(x: Tensor, call: Call, saved: Saved, graph: bool) -> Tensor:
    """Return the MLP's input, and set `saved.x_mid`, the residual stream between the halves."""
    half = attention_half if call.mixer is None else mixer_half
    delta = half(x, call, saved, graph)
    norm, factor = call.spec.mlp.before, call.spec.attention.multiplier
    scale = 1.0 if factor is None else factor
    if norm is None:
        saved.x_mid = torch.add(x, delta, alpha=scale)
        saved.rstd["mlp"] = None
        return saved.x_mid
    how = (norm.weight, norm.eps, norm.offset, norm.round_once, scale)
    saved.x_mid, normed, saved.rstd["mlp"] = ops.add_rms_norm(x, delta, *how)
    return normed


def _mlp_backward(dy: Tensor, call: Call, saved: Saved, grads: Gradients) -> Tensor:
    """Return the gradient of x_mid; first compute again what the policy has dropped."""
    again = saved.x_mid is None
    normed = _to_mlp(saved.x, call, saved, graph=True) if again else call.spec.mlp.enter(saved.x_mid)[0]
    if call.block is not None:
        return experts_gradient(dy, normed, call, saved, grads)
    if saved.gate_up is not None or dy.shape[0] <= compute_limits.MLP_TILE_TOKENS:
        return mlp_gradient(dy, normed, call, saved, grads)
    dx_mid = torch.empty_like(dy)
    for rows, part in tiles(call, dy.shape[0], backward=True):
        rstd = saved.rstd["mlp"]
        tile, tile_grads = Saved(0, x_mid=saved.x_mid[rows], rstd={"mlp": None if rstd is None else rstd[rows]}), {}
        tile.dinput = None if saved.dinput is None else saved.dinput[rows]
        dx_mid[rows] = mlp_gradient(dy[rows], normed[rows], part, tile, tile_grads)
        for name, more in tile_grads.items():
            grads[name] = tuple(a.add_(b) for a, b in zip(grads[name], more)) if name in grads else more
    return dx_mid
