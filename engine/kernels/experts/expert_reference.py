"""Define the products of tokens with the experts they were sent to, in plain torch.

Rows are sorted by expert. `ends` [E] is where each expert's rows end; rows behind the last belong to
none and give zeros. This is the definition of what the kernels compute, and the path of the CPU.

Shape letters: S rows (a token once for each of its experts), E experts, O output features, D input
features, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.kernels.experts.packed_experts import dequantize_experts
from engine.kernels.nf4_state import Nf4State


def _groups(ends_E: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each expert that is hit with its rows. It waits for the device."""
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = max(start, end)


def linear(
    x_SD: Tensor, state: Nf4State, ends_E: Tensor, bias_EO: Tensor | None = None,
    low_SR: Tensor | None = None, b_EOR: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return x W_e^T + bias_e + low B_e^T [S, O], each row with the weights of its expert e."""
    y_SO = x_SD.new_zeros(x_SD.shape[0], state.shape[1])
    for expert, rows in _groups(ends_E):
        y = x_SD[rows] @ dequantize_experts(state, expert, expert + 1, x_SD.dtype)[0].T
        if bias_EO is not None:
            y += bias_EO[expert].to(y.dtype)
        if low_SR is not None:
            y += low_SR[rows] @ b_EOR[expert].T
        y_SO[rows] = y
    return y_SO


def input_gradient(
    dy_SO: Tensor, state: Nf4State, ends_E: Tensor, dlow_SR: Tensor | None = None, a_ERD: Tensor | None = None
) -> Tensor:
    """Return dy W_e + dlow A_e [S, D]."""
    dx_SD = dy_SO.new_zeros(dy_SO.shape[0], state.shape[2])
    for expert, rows in _groups(ends_E):
        dx = dy_SO[rows] @ dequantize_experts(state, expert, expert + 1, dy_SO.dtype)[0]
        if dlow_SR is not None:
            dx += dlow_SR[rows] @ a_ERD[expert]
        dx_SD[rows] = dx
    return dx_SD


def add_terms_(
    y_SO: Tensor, ends_E: Tensor, bias_EO: Tensor | None, low_SR: Tensor | None, b_EOR: Tensor | None
) -> Tensor:
    """Add bias_e + low B_e^T to y [S, O] in place and return it."""
    for expert, rows in _groups(ends_E):
        if bias_EO is not None:
            y_SO[rows] += bias_EO[expert].to(y_SO.dtype)
        if low_SR is not None:
            y_SO[rows] += low_SR[rows] @ b_EOR[expert].T
    return y_SO


def low_rank(x_SD: Tensor, a_ERD: Tensor, ends_E: Tensor) -> Tensor:
    """Return x A_e^T [S, R]."""
    low_SR = x_SD.new_zeros(x_SD.shape[0], a_ERD.shape[1])
    for expert, rows in _groups(ends_E):
        low_SR[rows] = x_SD[rows] @ a_ERD[expert].T
    return low_SR


def outer(left_SM: Tensor, right_SN: Tensor, ends_E: Tensor) -> Tensor:
    """Return the sum over each expert's rows of left^T right, [E, M, N]; zeros for an expert that is not hit."""
    out_EMN = left_SM.new_zeros(ends_E.numel(), left_SM.shape[1], right_SN.shape[1])
    for expert, rows in _groups(ends_E):
        out_EMN[expert] = left_SM[rows].T @ right_SN[rows]
    return out_EMN


def combine(rows_SD: Tensor, inverse_S: Tensor, weights_TK: Tensor | None, num_choices: int) -> Tensor:
    """Return the sum over each token's K rows, times their weights if there are some, [T, D]."""
    rows_TKD = rows_SD[inverse_S].view(-1, num_choices, rows_SD.shape[1])
    rows_TKD = rows_TKD if weights_TK is None else rows_TKD * weights_TK.unsqueeze(-1)
    return rows_TKD.sum(1).to(rows_SD.dtype)


def weigh_rows_(dy_SF: Tensor, y_SF: Tensor, order_S: Tensor, weights_TK: Tensor) -> Tensor:
    """Return dy . y of each choice [T, K] in fp32, and multiply the rows of dy by their weights in place.

    order: the choice, counted through tokens, of each row.
    """
    dots_TK = torch.empty(weights_TK.shape, dtype=torch.float32, device=dy_SF.device)
    dots_TK.view(-1)[order_S] = (dy_SF * y_SF).sum(-1, dtype=torch.float32)
    dy_SF.mul_(weights_TK.flatten()[order_S].unsqueeze(-1).to(dy_SF.dtype))
    return dots_TK


def by_expert(b_JE: Tensor, factor: Tensor | float, rank: int, dtype: torch.dtype) -> Tensor:
    """Return factor * B [E, O, R] in `dtype`, of B [O * R, E]."""
    b_EOR = b_JE.view(-1, rank, b_JE.shape[1]).permute(2, 0, 1)
    return torch.mul(b_EOR, factor, out=torch.empty(b_EOR.shape, dtype=dtype, device=b_JE.device))


def as_stored(db_EOR: Tensor, factor: Tensor | float) -> Tensor:
    """Return factor * dB [O * R, E] in fp32, of dB [E, O, R]."""
    db_ORE = db_EOR.permute(1, 2, 0)
    out_ORE = torch.empty(db_ORE.shape, dtype=torch.float32, device=db_EOR.device)
    return torch.mul(db_ORE, factor, out=out_ORE).view(-1, db_EOR.shape[0])
