"""Compute the half of a fused decoder layer whose MLP is a mixture: the library's own block of router and experts.

The norms are ours, and so are packed experts (engine/quant/frozen_experts.py). The block is a small
autograd graph, as the mixer is in mixer_half.py: it ends at the normalised input and at what is
trained in the block. Router and shared experts are the library's code.

Where the graph is made again for the backward pass, nothing reads the block's output. Then experts
leave out their down projection, and keep what they dequantised for the gradient.

Shape letters: T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.config.targets import EXPERTS
from engine.layers.library.library_module import LibraryModule, seeded
from engine.layers.structure import Call, Gradients, Saved


class ExpertsBlock(LibraryModule):
    """Hold a library's block of router and experts."""

    def compute(self, x_TD: Tensor, seed: int | None) -> Tensor:
        """Return the block's output [T, D]. Differentiable in x and what is trained. The same seed gives the same dropout."""
        with seeded(seed, x_TD.device):
            out = self.module(x_TD[None])
        return (out[0] if isinstance(out, tuple) else out).view_as(x_TD)

    @contextmanager
    def unread(self) -> Iterator[None]:
        """Have packed experts compute what their gradients need, and no output, while the block runs."""
        experts = self.experts()
        try:
            for one in experts:
                one.is_unread = True
            yield
        finally:
            for one in experts:
                one.is_unread = False


def experts_half(normed: Tensor, call: Call, saved: Saved, graph: bool) -> Tensor:
    """Return x_mid plus what the experts add to it [T, D]. `graph` keeps the block's graph for the backward pass."""
    norm, factor = call.spec.mlp.after, call.spec.mlp.multiplier
    delta = _with_graph(normed, call, saved) if graph else call.block.compute(normed, call.block_seed)
    if norm is not None:
        saved.down_out = delta
        delta, saved.rstd["after_mlp"] = norm.forward(delta)
    return torch.add(saved.x_mid, delta, alpha=1.0 if factor is None else factor)


def experts_gradient(dy: Tensor, normed: Tensor, call: Call, saved: Saved, grads: Gradients) -> Tensor:
    """Return the gradient of x_mid [T, D], and set `grads` of what is trained in the block."""
    spec = call.spec.mlp
    if not saved.block:
        if spec.after is None:
            with call.block.unread():
                _with_graph(normed, call, saved)
        else:
            saved.down_out = _with_graph(normed, call, saved)
            saved.rstd["after_mlp"] = spec.after.forward(saved.down_out)[1]
    ddelta = spec.inner_gradient(dy, saved.down_out, saved.rstd.get("after_mlp"))
    saved.down_out = None
    adapters, (leaf, out), saved.block = call.block.adapters, saved.block, ()
    *found, dnormed = torch.autograd.grad(out, [*adapters, leaf], ddelta, materialize_grads=True)
    grads[EXPERTS] = tuple(found)
    return spec.input_gradient(dnormed.contiguous(), saved.x_mid, saved.rstd["mlp"], dy)


def _with_graph(normed: Tensor, call: Call, saved: Saved) -> Tensor:
    leaf = normed.detach().requires_grad_()
    with torch.enable_grad():
        out = call.block.compute(leaf, call.block_seed)
    saved.block = (leaf, out)
    return out.detach()
