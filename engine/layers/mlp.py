"""Compute the MLP half of a fused decoder layer, forward and backward, whole or in tiles of tokens.

Shape letters: T tokens, D hidden, F MLP hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from engine.kernels import ops
from engine.layers.structure import Call, Gradients, Saved, group_backward, low_rank_hidden, project
from engine.planning import compute_limits


def mlp(normed: Tensor, call: Call, saved: Saved) -> Tensor:
    """Return x_mid plus what the MLP adds to it, [T, D]."""
    saved.gate_up = call.groups["gate_up"].bare(normed)
    low_rank_hidden("gate_up", normed, call, saved)
    delta, factor = _down(call, saved), call.spec.mlp.multiplier
    return torch.add(saved.x_mid, delta, alpha=1.0 if factor is None else factor, out=delta)


def tiles(call: Call, num_tokens: int) -> Iterator[tuple[slice, Call]]:
    """Yield the rows of each tile of a long MLP, and the call that computes them.

    All tiles share weights that are dequantised once; each has its own dropout mask.
    """
    groups = {name: call.groups[name].with_weights() for name in ("gate_up", "down")}
    for i, start in enumerate(range(0, num_tokens, compute_limits.MLP_TILE_TOKENS)):
        tile = {name: replace(group, seed=group.seed + i) for name, group in groups.items()}
        yield slice(start, start + compute_limits.MLP_TILE_TOKENS), replace(call, groups=tile)


def _down(call: Call, saved: Saved) -> Tensor:
    """Return what the MLP adds to the residual stream before its multiplier, as a new tensor."""
    norm, activation = call.spec.mlp.after, call.spec.mlp.activation
    down = project("down", ops.glu(*_halves(saved.gate_up), activation, *_gate_up_terms(call, saved)), call, saved)
    if norm is not None:
        saved.down_out = down
        down, saved.rstd["after_mlp"] = norm.forward(down)
    return down


def _halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return gate_up.chunk(2, dim=1)


def _gate_up_terms(call: Call, saved: Saved) -> list[ops.LowRank | None]:
    """Return the adapters' part of gate and up, which the activation kernels add."""
    terms = call.groups["gate_up"].terms(saved.low["gate_up"])
    if len(terms) == 2:
        return terms
    (merged,) = terms  # one layer makes both
    return [None, None] if merged is None else [ops.LowRank(merged.low_TR, b_FR) for b_FR in merged.b_FR.chunk(2)]


def mlp_gradient(dy: Tensor, normed: Tensor, call: Call, saved: Saved, grads: Gradients) -> Tensor:
    spec, group = call.spec.mlp, call.groups["gate_up"]
    weights = group.weights()
    if saved.gate_up is None:
        saved.gate_up = group.bare(normed, weights)
        low_rank_hidden("gate_up", normed, call, saved)
        if spec.after is not None:
            _down(call, saved)
    ddown = spec.inner_gradient(dy, saved.down_out, saved.rstd.get("after_mlp"))
    saved.down_out = None
    dgate_up = _activation_backward(ddown, call, saved, grads)
    dnormed = group_backward("gate_up", dgate_up, normed, call, saved, grads, weights)
    return spec.input_gradient(dnormed, saved.x_mid, saved.rstd["mlp"], dy)


def _activation_backward(ddown: Tensor, call: Call, saved: Saved, grads: Gradients) -> Tensor:
    """Return the gradient of gate | up, in place of their values.

    It also sets the down projection's adapter gradients in `grads`.
    """
    group = call.groups["down"]
    dlow = group.low_gradient(ddown)
    if group.dropout and dlow is not None:
        dhidden, term = group.input_gradient(ddown, dlow), None
    else:
        dhidden, term = group.bare_input_gradient(ddown), group.input_term(dlow)
    gate_up, saved.gate_up = saved.gate_up, None
    ops.glu_backward_(dhidden, *_halves(gate_up), call.spec.mlp.activation, *_gate_up_terms(call, saved), term)
    hidden = dhidden  # in place
    grads["down"] = group.adapter_gradients(ddown, dlow, hidden, low_rank_hidden("down", hidden, call, saved))
    return gate_up
