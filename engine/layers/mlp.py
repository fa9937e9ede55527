"""Compute the MLP half of a fused decoder layer and its tail, forward and backward.

Both run whole or in tiles of tokens. The tail is what some families do to the residual stream h
after the halves:

    y = scalar * (h + norm(projection(activation(gate(h)) * input)))

`input` is an embedding of the token that this layer alone reads. The forward pass keeps the gate
[T, P] alone: the rest is cheap to compute again, because P is small. There must be a norm after the
MLP, because h is made again from what that norm keeps.

Shape letters: T tokens, D hidden, F MLP hidden, P features of the per-layer input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from engine.kernels import ops
from engine.kernels.eight_bit import int8_ops
from engine.kernels.eight_bit.int8_ops import Int8Rows
from engine.layers.projection_group import Weights
from engine.layers.structure import Call, Gradients, Saved, group_backward, low_rank_hidden, project
from engine.shape import compute_limits
from engine.shape.families import INPUT_GATE, INPUT_PROJECTION


def mlp(normed: Tensor, call: Call, saved: Saved) -> Tensor:
    """Return x_mid plus what the MLP adds to it, after the layer's tail, [T, D]."""
    saved.gate_up = _gate_up(normed, call, saved)
    h = _added(_down(call, saved), call, saved)
    return h if call.spec.tail is None else _tail(h, call, saved)


def _added(delta: Tensor, call: Call, saved: Saved) -> Tensor:
    """Return x_mid + multiplier * delta, in place of delta."""
    factor = call.spec.mlp.multiplier
    return torch.add(saved.x_mid, delta, alpha=1.0 if factor is None else factor, out=delta)


def tiles(call: Call, num_tokens: int, *, backward: bool) -> Iterator[tuple[slice, Call]]:
    """Yield the rows of each tile of a long MLP, and the call that computes them in a pass.

    All tiles share weights that are dequantised once; each has its own dropout mask.
    """
    mine = ("gate_up", "down", INPUT_GATE, INPUT_PROJECTION)
    unread = () if not backward or call.spec.mlp.after is not None else ("down",)  # no gradient needs its output
    groups = {
        name: group.with_weights(forward=name not in unread, backward=backward)
        for name, group in call.groups.items()
        if name in mine
    }
    for i, start in enumerate(range(0, num_tokens, compute_limits.MLP_TILE_TOKENS)):
        tile = {name: group.of_tile(i) for name, group in groups.items()}
        rows = slice(start, start + compute_limits.MLP_TILE_TOKENS)
        yield rows, replace(call, groups=tile, input_TP=None if call.input_TP is None else call.input_TP[rows])


def _down(call: Call, saved: Saved) -> Tensor:
    """Return what the MLP adds to the residual stream before its multiplier, as a new tensor."""
    norm, activation = call.spec.mlp.after, call.spec.mlp.activation
    down = project("down", ops.glu(*_halves(saved.gate_up), activation, *_gate_up_terms(call, saved)), call, saved)
    if norm is not None:
        saved.down_out = down
        down, saved.rstd["after_mlp"] = norm.forward(down)
    return down


def _gate_up(normed: Tensor, call: Call, saved: Saved, weights: Weights | None = None) -> Tensor:
    """Return gate | up, to which `_gate_up_terms` must still be added, and save the adapters' low-rank hidden."""
    return call.groups["gate_up"].before_terms(normed, low_rank_hidden("gate_up", normed, call, saved), weights)


def _halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return gate_up.chunk(2, dim=1)


def _gate_up_terms(call: Call, saved: Saved) -> list[ops.LowRank | None]:
    """Return the adapters' part of gate and up, which the activation kernels add if the product has not."""
    group = call.groups["gate_up"]
    if group.adds_terms:
        return [None, None]
    terms = group.terms(saved.low["gate_up"])
    if len(terms) == 2:
        return terms
    (merged,) = terms  # one layer makes both
    return [None, None] if merged is None else [ops.LowRank(merged.low_TR, b_FR) for b_FR in merged.b_FR.chunk(2)]


def mlp_gradient(dy: Tensor, normed: Tensor, call: Call, saved: Saved, grads: Gradients) -> Tensor:
    spec, group = call.spec.mlp, call.groups["gate_up"]
    again, h = saved.gate_up is None, None
    weights = group.weights_for(forward=again, backward=True)
    if again:
        saved.gate_up = _gate_up(normed, call, saved, weights)
        if spec.after is not None:
            _down(call, saved)
    weights = None if group.is_int8_backward else weights  # else they would live on, beside their codes
    if call.spec.tail is not None:
        if _needs_h(call, saved):
            h = _added(spec.after.forward(saved.down_out)[0], call, saved)
        dy = _tail_gradient(dy, h, call, saved, grads)
        h = None
    ddown = spec.inner_gradient(dy, saved.down_out, saved.rstd.get("after_mlp"))
    saved.down_out = None
    dgate_up, rows = _activation_backward(ddown, call, saved, grads)
    dnormed = group_backward("gate_up", dgate_up, normed, call, saved, grads, weights, rows=rows)
    del rows
    return spec.input_gradient(dnormed, saved.x_mid, saved.rstd["mlp"], dy)


def _activation_backward(ddown: Tensor, call: Call, saved: Saved, grads: Gradients) -> tuple[Tensor, Int8Rows | None]:
    """Return the gradient of gate | up, in place of their values, and its codes if the same kernel makes them.

    It also sets the down projection's adapter gradients in `grads`.
    """
    group = call.groups["down"]
    dlow = group.low_gradient(ddown)
    if dlow is not None and (group.noise is not None or group.is_int8_backward):  # the product adds it
        dhidden, term = group.input_gradient(ddown, dlow), None
    else:
        dhidden, term = group.bare_input_gradient(ddown), group.input_term(dlow)
    gate_up, saved.gate_up = saved.gate_up, None
    terms, activation, rows = [*_gate_up_terms(call, saved), term], call.spec.mlp.activation, None
    if call.groups["gate_up"].is_int8_backward and not any(terms):
        rows = int8_ops.glu_backward_codes_(dhidden, gate_up, activation)
    else:
        ops.glu_backward_(dhidden, *_halves(gate_up), activation, *terms)
    hidden = dhidden  # in place
    grads["down"] = group.adapter_gradients(ddown, dlow, hidden, low_rank_hidden("down", hidden, call, saved))
    return gate_up, rows


def _tail(h_TD: Tensor, call: Call, saved: Saved) -> Tensor:
    """Return the layer's output [T, D], in place of h."""
    spec = call.spec.tail
    if spec.norm is not None:
        saved.tail_gate = project(INPUT_GATE, h_TD, call, saved)
        out_TD = project(INPUT_PROJECTION, _tail_hidden(call, saved), call, saved)
        delta_TD, saved.rstd["tail"] = spec.norm.forward(out_TD)
        h_TD.add_(delta_TD)
    return h_TD if spec.scalar is None else h_TD.mul_(spec.scalar)


def _needs_h(call: Call, saved: Saved) -> bool:
    """Return True if the gradient reads h: for an adapter of the gate, or for a gate not kept."""
    return call.spec.tail.norm is not None and (saved.tail_gate is None or call.groups[INPUT_GATE].is_adapted)


def _tail_gradient(dy_TD: Tensor, h_TD: Tensor | None, call: Call, saved: Saved, grads: Gradients) -> Tensor:
    """Return the gradient of h [T, D]; h is None if `_needs_h` says so. Fill `saved.dinput` if it is there."""
    spec = call.spec.tail
    if spec.scalar is not None:
        dy_TD = dy_TD * spec.scalar
    if spec.norm is None:
        return dy_TD
    if saved.tail_gate is None:
        saved.tail_gate = project(INPUT_GATE, h_TD, call, saved)
    hidden_TP = _tail_hidden(call, saved)
    out_TD = project(INPUT_PROJECTION, hidden_TP, call, saved)
    rstd_T = saved.rstd["tail"] if "tail" in saved.rstd else spec.norm.forward(out_TD)[1]
    dout_TD = spec.norm.backward(dy_TD, out_TD, rstd_T)
    dhidden_TP = group_backward(INPUT_PROJECTION, dout_TD, hidden_TP, call, saved, grads)
    dgate_TP, dinput_TP, saved.tail_gate = saved.tail_gate, call.input_TP.clone(), None
    ops.glu_backward_(dhidden_TP, dgate_TP, dinput_TP, spec.activation)
    if saved.dinput is not None:
        saved.dinput.copy_(dinput_TP)
    return group_backward(INPUT_GATE, dgate_TP, h_TD, call, saved, grads).add_(dy_TD)


def _tail_hidden(call: Call, saved: Saved) -> Tensor:
    return ops.glu(saved.tail_gate, call.input_TP, call.spec.tail.activation)
