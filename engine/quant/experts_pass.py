"""Compute the experts of a mixture and all their gradients, as one autograd function.

Tokens are sorted by expert once. What the gate reads is saved; the backward pass writes there.

Shape letters: T tokens, K experts a token, S = T * K rows sorted by expert, E experts, D hidden, R rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.kernels.experts import expert_ops

if TYPE_CHECKING:
    from engine.quant.frozen_experts import FrozenExperts

UP, DOWN = "gate_up_proj", "down_proj"


class ExpertsPass(torch.autograd.Function):
    """Compute all experts. Gradients go to hidden states, routing weights and adapters."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, module: FrozenExperts, experts_TK: Tensor, *_: Tensor) -> Tensor:
        num_choices = experts_TK.shape[1]
        order_S, inverse_S, ends_E = expert_ops.sort_by_expert(experts_TK, module.num_experts)
        casts = {name: layer.by_expert(x_TD.dtype) for name, layer in module.adapters.items()}
        dense = None
        if module.is_unread:
            dense = expert_ops.dequantized_up(x_TD, num_choices, module.state(UP), module.state(DOWN), module.room)
        token_S = order_S // num_choices
        gate_up, low_up = _project(UP, x_TD[token_S], module, ends_E, casts, dense)
        ctx.module, ctx.casts, ctx.dense = module, casts, dense
        ctx.save_for_backward(x_TD, weights_TK, experts_TK, order_S, token_S, inverse_S, ends_E, gate_up, low_up)
        if module.is_unread:
            return torch.empty_like(x_TD)
        out_SD, _ = _project(DOWN, module.gate(gate_up), module, ends_E, casts)
        return expert_ops.combine(out_SD, inverse_S, weights_TK, num_choices)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, experts_TK, order_S, token_S, inverse_S, ends_E, gate_up, low_up = ctx.saved_tensors
        module, casts, num_choices = ctx.module, ctx.casts, weights_TK.shape[1]
        dy_SD = dy_TD[token_S]
        weights_S1 = weights_TK.flatten()[order_S].unsqueeze(-1).to(dy_TD.dtype)
        hidden = module.gate(gate_up)
        grads: dict[str, tuple[Tensor, Tensor]] = {}
        dlow = _low_gradient(DOWN, dy_SD, ends_E, casts)
        dhidden = _project_back(DOWN, dy_SD, dlow, module, ends_E, casts)
        if DOWN in casts:
            low = expert_ops.low_rank(hidden, casts[DOWN][0], ends_E)
            both = dlow * weights_S1, low * weights_S1
            grads[DOWN] = _adapter_gradients(DOWN, dy_SD, *both, hidden, module, ends_E)
        del dy_SD
        dweights_TK = expert_ops.weigh_rows_(dhidden, hidden, order_S, weights_TK)  # now dhidden is weighted
        if (bias_ED := module.bias(DOWN)) is not None:
            dweights_TK += expert_ops.dot_bias(dy_TD, bias_ED, experts_TK)
        del hidden
        dgate_up = module.gate_backward(gate_up, dhidden)
        del dhidden
        dlow = _low_gradient(UP, dgate_up, ends_E, casts)
        if UP in casts:
            grads[UP] = _adapter_gradients(UP, dgate_up, dlow, low_up, x_TD[token_S], module, ends_E)
        dx_SD = _project_back(UP, dgate_up, dlow, module, ends_E, casts, ctx.dense)
        ctx.dense = None
        dx_TD = expert_ops.combine(dx_SD, inverse_S, None, num_choices)
        return dx_TD, dweights_TK.to(weights_TK.dtype), None, None, *(grad for name in module.adapters for grad in grads[name])


def _project(
    name: str, x: Tensor, module: FrozenExperts, ends_E: Tensor, casts: dict[str, Any], dense: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the product with one weight and its adapter, and the adapter's hidden [S, R]. dense: the weight, if it is there."""
    a_ERD, b_EOR = casts.get(name, (None, None))
    low = None if a_ERD is None else expert_ops.low_rank(x, a_ERD, ends_E)
    return expert_ops.linear(x, module.state(name), ends_E, module.bias(name), low, b_EOR, module.room, dense), low


def _low_gradient(name: str, dy: Tensor, ends_E: Tensor, casts: dict[str, Any]) -> Tensor | None:
    """Return the gradient of a weight's adapter's hidden [S, R], None without an adapter."""
    return None if name not in casts else expert_ops.low_rank(dy, casts[name][1].transpose(1, 2), ends_E)


def _project_back(
    name: str, dy: Tensor, dlow: Tensor | None, module: FrozenExperts, ends_E: Tensor, casts: dict[str, Any],
    dense: Tensor | None = None,
) -> Tensor:  # fmt: skip
    a_ERD = casts[name][0] if name in casts else None
    return expert_ops.input_gradient(dy, module.state(name), ends_E, dlow, a_ERD, module.room, dense)


def _adapter_gradients(
    name: str, dy: Tensor, dlow: Tensor, low: Tensor, x: Tensor, module: FrozenExperts, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a weight's lora_a and lora_b."""
    return module.adapters[name].as_stored(expert_ops.outer(dlow, x, ends_E), expert_ops.outer(dy, low, ends_E))
