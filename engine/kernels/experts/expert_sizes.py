"""Allocate what the products of experts allocate, on the meta device; compute nothing.

Memory of a library's layers is measured so, with experts in their place (engine/model/library_layers.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.kernels.nf4_state import Nf4State


def linear(x_SD: Tensor, state: Nf4State, *_: Any) -> Tensor:
    """Return an empty [S, O]."""
    return x_SD.new_empty(x_SD.shape[0], state.shape[1])


def input_gradient(dy_SO: Tensor, state: Nf4State, *_: Any) -> Tensor:
    """Return an empty [S, D]."""
    return dy_SO.new_empty(dy_SO.shape[0], state.shape[2])


def low_rank(x_SD: Tensor, a_ERD: Tensor, ends_E: Tensor) -> Tensor:
    """Return an empty [S, R]."""
    return x_SD.new_empty(x_SD.shape[0], a_ERD.shape[1])


def outer(left_SM: Tensor, right_SN: Tensor, ends_E: Tensor) -> Tensor:
    """Return an empty [E, M, N] in fp32, as the kernels do."""
    shape = ends_E.numel(), left_SM.shape[1], right_SN.shape[1]
    return torch.empty(shape, dtype=torch.float32, device=left_SM.device)


def combine(rows_SD: Tensor, inverse_S: Tensor, weights_TK: Tensor | None, num_choices: int) -> Tensor:
    """Return an empty [T, D]."""
    return rows_SD.new_empty(rows_SD.shape[0] // num_choices, rows_SD.shape[1])


def weigh_rows_(dy_SF: Tensor, y_SF: Tensor, order_S: Tensor, weights_TK: Tensor) -> Tensor:
    """Return an empty [T, K] in fp32."""
    return torch.empty(weights_TK.shape, dtype=torch.float32, device=dy_SF.device)
