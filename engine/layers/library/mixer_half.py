"""Compute the half of a fused decoder layer whose token mixer is the library's own module.

The norms are ours. The mixer is a small autograd graph, as attention is in attention_half.py: it
ends at the normalised input and at the adapters of the mixer's projections.

Under HOST the graph is not kept but made again for the backward pass. Its tensors may belong to the
library, so they cannot leave device memory.

Shape letters: T tokens, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.layers.structure import MIXER, Call, Gradients, Saved
from engine.shape.policies import Policy


def mixer_half(x: Tensor, call: Call, saved: Saved, graph: bool) -> Tensor:
    """Return what the mixer adds to the residual stream, before its multiplier.

    `graph` keeps the mixer's autograd graph for the backward pass.
    """
    spec = call.spec.attention
    normed, saved.rstd["attention"] = spec.enter(x)
    if graph and call.policy is not Policy.HOST:
        delta = _with_graph(normed, call, saved)
    else:
        delta = call.mixer.mix(normed, call.documents, call.mixer_seed)
    if spec.after is not None:
        saved.o_out = delta
        delta, saved.rstd["after_attention"] = spec.after.forward(delta)
    return delta


def mixer_gradient(dx_mid: Tensor, call: Call, saved: Saved, grads: Gradients, wants_dx: bool) -> Tensor | None:
    """Return the gradient of x, or None if nothing below the layer is trained."""
    spec, adapters = call.spec.attention, call.mixer.adapters
    if not wants_dx and not adapters:
        grads[MIXER] = ()
        return None
    ddelta = spec.inner_gradient(dx_mid, saved.o_out, saved.rstd.get("after_attention"))
    if not saved.attention:
        _with_graph(spec.enter(saved.x)[0], call, saved)
    (leaf, out), saved.attention = saved.attention, ()
    inputs = [*adapters, leaf] if wants_dx else adapters
    found = torch.autograd.grad(out, inputs, ddelta, materialize_grads=True)
    grads[MIXER] = found[: len(adapters)]
    return spec.input_gradient(found[-1].contiguous(), saved.x, saved.rstd["attention"], dx_mid) if wants_dx else None


def _with_graph(normed: Tensor, call: Call, saved: Saved) -> Tensor:
    leaf = normed.detach().requires_grad_()
    with torch.enable_grad():
        out = call.mixer.mix(leaf, call.documents, call.mixer_seed)
    saved.attention = (leaf, out)
    return out.detach()
