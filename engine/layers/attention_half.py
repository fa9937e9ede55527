"""Compute the attention half of a fused decoder layer, forward and backward.

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
from engine.layers.structure import Call, Gradients, Saved, group_backward, project
from engine.shape.policies import Policy


def attention_half(x: Tensor, call: Call, saved: Saved, graph: bool) -> Tensor:
    """Return what attention adds to the residual stream, before its multiplier.

    `graph` keeps the autograd graph of attention, for the backward pass. If there is one already,
    its output is taken.
    """
    spec = call.spec.attention
    if saved.attention:  # kept since the forward pass
        if spec.output_gate:  # the projection of queries makes it
            saved.inputs += _queries_keys_values(x, call, saved)
        out = saved.attention[-1].detach()
    else:
        qkv = _queries_keys_values(x, call, saved)
        out = _graph(qkv, call, saved).detach() if graph else attend(*qkv, call.documents, spec.options, spec.sinks)
    delta = project("o", _gated(out, saved).reshape(x.shape[0], -1), call, saved)
    if spec.after is not None:
        saved.o_out = delta
        delta, saved.rstd["after_attention"] = spec.after.forward(delta)
    return delta


def attention_gradient(
    dx_mid: Tensor, call: Call, saved: Saved, grads: Gradients, wants_dx: bool, dstored: tuple[Tensor, ...] = ()
) -> Tensor | None:
    """Return the gradient of x, or None if nothing below the layer is trained.

    `dstored` are the gradients of the keys and values that later layers have read. Those of keys
    and values that this layer reads become `grads["shared"]`.
    """
    spec = call.spec.attention
    ddelta = spec.inner_gradient(dx_mid, saved.o_out, saved.rstd.get("after_attention"))
    *leaves, out = saved.attention
    flat_out = _gated(out.detach(), saved).reshape(ddelta.shape[0], -1)
    goes_on = wants_dx or call.groups["qkv"].is_adapted or any(t.requires_grad for t in call.shared)
    dout = group_backward("o", ddelta, flat_out, call, saved, grads, wants_dx=goes_on)
    if not goes_on:
        grads["qkv"] = ()
        return None
    dout, dgate = _ungated(dout.view(out.shape), out.detach(), saved)
    if saved.q is None:
        saved.inputs += _queries_keys_values(saved.x, call, saved)
    gradients = list(torch.autograd.grad(out, leaves, dout))
    saved.attention = ()
    saved.inputs.clear()
    if spec.reads:
        grads["shared"] = tuple(gradients[1:])
        del gradients[1:]
    for i, more in enumerate(dstored, start=1):
        gradients[i] = gradients[i] + more
    _undo_preparation(gradients, call, saved)
    if dgate is not None:
        gradients[0] = torch.stack((gradients[0], dgate), dim=2)
    normed = saved.normed if saved.normed is not None else spec.enter(saved.x)[0]
    dqkv = torch.cat([gradient.reshape(gradient.shape[0], -1) for gradient in gradients], dim=1)
    dnormed = group_backward("qkv", dqkv, normed, call, saved, grads, wants_dx=wants_dx)
    return spec.input_gradient(dnormed, saved.x, saved.rstd["attention"], dx_mid) if wants_dx else None


def without_inputs(saved: Saved) -> Saved:
    """Return what of attention its gradient needs if the layer's input is kept too.

    That is the autograd graph without its inputs, which `attention_gradient` makes again.
    """
    for leaf in saved.attention[:-1]:
        leaf.data = leaf.new_empty(0)  # the graph asks for its gradient, and not for its values
    saved.inputs.clear()
    return Saved(saved.x, attention=saved.attention, graph=saved.graph, inputs=saved.inputs)


def _queries_keys_values(x: Tensor, call: Call, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """Return attention's inputs, and save what their gradients need."""
    spec = call.spec.attention
    normed, saved.rstd["attention"] = spec.enter(x)
    qkv, saved.normed = project("qkv", normed, call, saved), normed
    parts = qkv.split([size for size in spec.features if size], dim=1)
    saved.q, *own = (part.unflatten(1, (-1, spec.head_dim)) for part in parts)
    saved.k, saved.v = (own[0], own[-1]) if own else (None, None)
    if spec.output_gate:
        saved.q, saved.gate = saved.q[:, 0::2], saved.q[:, 1::2]
    return _prepared(call, saved)


def _graph(qkv: tuple[Tensor, ...], call: Call, saved: Saved) -> Tensor:
    """Return attention's output with its autograd graph, and save both.

    Under HOST, the graph reads its inputs where `saved.inputs` has them at the time, so they may be
    made again. What else it saves is noted in `saved.graph`.
    """
    leaves = [t.detach().requires_grad_() for t in qkv]
    places = nullcontext()
    if call.policy is Policy.HOST:
        saved.inputs += [t.detach() for t in qkv]
        places = saved_tensors_hooks(partial(_noted, saved.graph, saved.inputs), partial(_found, saved.inputs))
    with torch.enable_grad(), places:
        out = attend(*leaves, call.documents, call.spec.attention.options, call.spec.attention.sinks)
    saved.attention = (*leaves, out)
    return out


def _prepared(call: Call, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values for attention: normalised, rotated and scaled as the spec says.

    What comes before the norms, or all if there are none, changes `saved` in place: the gradient
    needs only its inverse.
    """
    spec = call.spec.attention
    q, k, v = saved.q, saved.k, saved.v
    if spec.norms_rotated:
        _rotate_(q, k, call)
    if spec.q_norm is not None:
        q, saved.rstd["q"] = spec.q_norm.forward(q)
    if spec.k_norm is not None:
        k, saved.rstd["k"] = spec.k_norm.forward(k)
    if spec.v_norm is not None:
        v, saved.rstd["v"] = spec.v_norm.forward(v)
    if not spec.norms_rotated:
        _rotate_(q, k, call)
    if call.query_factors_T is not None:
        q.mul_(call.query_factors_T.to(q.dtype)[:, None, None])
    if spec.reads:
        return q, *call.shared
    saved.stored = (k, v) if spec.stores else ()
    return q, k, v


def _undo_preparation(gradients: list[Tensor], call: Call, saved: Saved) -> None:
    """Replace the gradients of queries, keys and values by those of what the qkv group projects.

    Each is freed as soon as the next is there. A layer that reads has those of queries only.
    """
    spec = call.spec.attention
    gradients[:2] = [gradient.contiguous() for gradient in gradients[:2]]
    if call.query_factors_T is not None:
        gradients[0].mul_(call.query_factors_T.to(gradients[0].dtype)[:, None, None])
    if not spec.norms_rotated:
        _rotate_(gradients[0], None if spec.reads else gradients[1], call, inverse=True)
    projected = ("q", spec.q_norm, saved.q), ("k", spec.k_norm, saved.k), ("v", spec.v_norm, saved.v)
    for i, (name, norm, x) in enumerate(projected):
        if norm is not None:
            gradients[i] = norm.backward(gradients[i], x, saved.rstd[name])
    if spec.norms_rotated:
        _rotate_(gradients[0], None if spec.reads else gradients[1], call, inverse=True)
    if not spec.reads and not spec.features[2]:
        gradients[1].add_(gradients.pop())


def _rotate_(q: Tensor, k: Tensor | None, call: Call, inverse: bool = False) -> None:
    """Rotate queries, and keys if there are some, in place, if the spec says so."""
    spec, tables = call.spec.attention, (call.cos_TR, call.sin_TR)
    if spec.rotary is not None and call.cos_TR is not None:  # some models have no rotation at all
        cos_TR, sin_TR = (torch.cat([half, half], dim=1) for half in tables) if spec.half_tables else tables
        ops.rope_(q, q[:, :0] if k is None else k, cos_TR, sin_TR, inverse=inverse, pairs=spec.rotary == "pairs")


def _gated(out: Tensor, saved: Saved) -> Tensor:
    """Return attention's output [T, H, K] times the sigmoid of its gate, if there is one."""
    return out if saved.gate is None else out * torch.sigmoid(saved.gate)


def _ungated(dout: Tensor, out: Tensor, saved: Saved) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of attention's output and of its gate, from that of the gated output."""
    if saved.gate is None:
        return dout, None
    gate = torch.sigmoid(saved.gate)
    return dout * gate, torch.ops.aten.sigmoid_backward(dout * out, gate)


def _noted(graph: list[Tensor], inputs: list[Tensor], saved: Tensor) -> Tensor | tuple[Any, ...]:
    """Return what stands for a tensor that autograd saves: an input's number and layout, or the tensor.

    The tensor is noted, and detached: a graph that holds its own output keeps it alive until a
    backward pass, which may never run.
    """
    for i, part in enumerate(inputs):
        if part.untyped_storage()._cdata == saved.untyped_storage()._cdata:
            return i, saved.shape, saved.stride(), saved.storage_offset()
    graph.append(saved.detach())
    return graph[-1]


def _found(inputs: list[Tensor], noted: Tensor | tuple[Any, ...]) -> Tensor:
    """Return the tensor that `_noted` stood for."""
    if isinstance(noted, Tensor):
        return noted
    i, *layout = noted
    return inputs[i].as_strided(*layout)
