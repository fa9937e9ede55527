"""Choose what computes the products of experts: kernels or torch's grouped product on CUDA, plain torch otherwise.

Rows are sorted by expert; `ends` [E] int32 or int64 says where each expert's rows end. Nothing here
waits for a CUDA device. See expert_reference.py for the definitions and the shape letters.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from engine.kernels import ops
from engine.kernels.experts import expert_reference, expert_sizes, grouped_dense
from engine.kernels.nf4_state import Nf4State


def sort_by_expert(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the order of the T * K choices by expert [S], its inverse [S], and the ends [E] int32.

    A choice above the last expert, with which some models skip a token, comes last. Sorting takes a pass and
    about three launches for each byte of a number, so numbers are made short.
    """
    short = torch.uint8 if num_experts < 256 else torch.int16
    sorted_S, order_S = experts_TK.flatten().clamp(max=num_experts).to(short).sort(stable=True)
    inverse_S = torch.empty_like(order_S)
    inverse_S[order_S] = torch.arange(order_S.numel(), device=order_S.device)
    numbers_E = torch.arange(num_experts, device=order_S.device, dtype=sorted_S.dtype)
    return order_S, inverse_S, torch.searchsorted(sorted_S, numbers_E, right=True, out_int32=True)


def linear(
    x_SD: Tensor, state: Nf4State, ends_E: Tensor, bias_EO: Tensor | None = None,
    low_SR: Tensor | None = None, b_EOR: Tensor | None = None, room: int = 0, dense: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return x W_e^T + bias_e + low B_e^T [S, O].

    room: bytes that dequantised experts may take. dense: what `dequantized_up` returned for them.
    """
    if dense is not None or grouped_dense.takes(x_SD, state, room):
        return _add_terms_(grouped_dense.linear(x_SD, state, ends_E, dense), ends_E, bias_EO, low_SR, b_EOR)
    return _family(x_SD, state).linear(x_SD, state, ends_E, bias_EO, low_SR, b_EOR)


def input_gradient(
    dy_SO: Tensor, state: Nf4State, ends_E: Tensor, dlow_SR: Tensor | None = None, a_ERD: Tensor | None = None,
    room: int = 0, dense: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return dy W_e + dlow A_e [S, D]. room, dense: as for `linear`."""
    if dense is not None or grouped_dense.takes(dy_SO, state, room):
        turned_EDR = None if a_ERD is None else a_ERD.transpose(1, 2)
        return _add_terms_(grouped_dense.input_gradient(dy_SO, state, ends_E, dense), ends_E, None, dlow_SR, turned_EDR)
    return _family(dy_SO, state).input_gradient(dy_SO, state, ends_E, dlow_SR, a_ERD)


def dequantized_up(x_TD: Tensor, num_choices: int, up: Nf4State, down: Nf4State, room: int) -> Tensor | None:
    """Return the experts of the first weight in 16 bits, to be used twice; None if there is no room for both weights.

    room: bytes that dequantised experts may take, of two weights whose products may be needed at once.
    """
    both = grouped_dense.dense_bytes(up.shape) + grouped_dense.dense_bytes(down.shape)
    is_faster = grouped_dense.takes(x_TD, up, room, num_choices)
    return grouped_dense.dequantized(up, x_TD.dtype) if room >= both and is_faster else None


def _add_terms_(
    y_SO: Tensor, ends_E: Tensor, bias_EO: Tensor | None, low_SR: Tensor | None, b_EOR: Tensor | None
) -> Tensor:
    """Add bias_e + low B_e^T to y in place, and return y."""
    if bias_EO is None and low_SR is None:
        return y_SO
    return _family(y_SO).add_terms_(y_SO, ends_E, bias_EO, low_SR, b_EOR)


def low_rank(x_SD: Tensor, a_ERD: Tensor, ends_E: Tensor) -> Tensor:
    """Return x A_e^T [S, R]."""
    return _family(x_SD).low_rank(x_SD, a_ERD, ends_E)


def outer(left_SM: Tensor, right_SN: Tensor, ends_E: Tensor) -> Tensor:
    """Return the sum over each expert's rows of left^T right, [E, M, N]."""
    return _family(left_SM).outer(left_SM, right_SN, ends_E)


def combine(rows_SD: Tensor, inverse_S: Tensor, weights_TK: Tensor | None, num_choices: int) -> Tensor:
    """Return the sum over each token's K rows, times their weights if there are some, [T, D].

    inverse: as `sort_by_expert` has it.
    """
    return _family(rows_SD).combine(rows_SD, inverse_S, weights_TK, num_choices)


def b_by_expert(b_JE: Tensor, factor: Tensor | float, rank: int, dtype: torch.dtype) -> Tensor:
    """Return factor * B [E, O, R] in `dtype`, of a contiguous B [O * R, E]."""
    return _turning(b_JE).by_expert(b_JE, factor, rank, dtype)


def b_as_stored(db_EOR: Tensor, factor: Tensor | float) -> Tensor:
    """Return factor * dB [O * R, E] in fp32, of dB [E, O, R]."""
    return _turning(db_EOR).as_stored(db_EOR, factor)


def _turning(x: Tensor) -> ModuleType:
    return ops.load_kernels("experts.turned") if _is_triton(x) else expert_reference


def weigh_rows_(dy_SF: Tensor, y_SF: Tensor, order_S: Tensor, weights_TK: Tensor) -> Tensor:
    """Return dy . y of each choice [T, K] in fp32, and multiply the rows of dy by their weights in place.

    order: as `sort_by_expert` has it.
    """
    kernels = ops.load_kernels("experts.routed_rows") if _is_triton(dy_SF) else _family(dy_SF)
    return kernels.weigh_rows_(dy_SF, y_SF, order_S, weights_TK)


def dot_bias(dy_TD: Tensor, bias_ED: Tensor, experts_TK: Tensor) -> Tensor:
    """Return dy . bias of each chosen expert, [T, K] in fp32. A choice above the last expert has no bias."""
    dots_TE = dy_TD.float() @ bias_ED.float().T
    found_TK = dots_TE.gather(1, experts_TK.clamp(max=bias_ED.shape[0] - 1))
    return found_TK.masked_fill(experts_TK >= bias_ED.shape[0], 0.0)


def clamped_gate(gate_up_SG: Tensor, limit: float, alpha: float) -> Tensor | None:
    """Return gpt-oss's (clamp(u) + 1) * g * sigmoid(alpha * g) [S, F]; None where the library's own code computes it."""
    return _gates().clamped_gate(gate_up_SG, limit, alpha) if _is_triton(gate_up_SG) else None


def clamped_gate_backward_(gate_up_SG: Tensor, dh_SF: Tensor, limit: float, alpha: float) -> bool:
    """Overwrite gate and up by their gradients; False, and nothing is done, where the library's own code does it."""
    if _is_triton(gate_up_SG):
        _gates().clamped_gate_backward_(gate_up_SG, dh_SF, limit, alpha)
    return _is_triton(gate_up_SG)


def _gates() -> ModuleType:
    return ops.load_kernels("experts.clamped_gate")


def _is_triton(x: Tensor) -> bool:
    return x.is_cuda or (ops.FORCE_TRITON and not x.is_meta)


def _family(x: Tensor, state: Nf4State | None = None) -> ModuleType:
    """Return the kernels for a CUDA tensor, and plain torch on the CPU and for weights that the kernels do not take."""
    if x.is_meta:
        return expert_sizes
    if not _is_triton(x):
        return expert_reference
    kernels = ops.load_kernels("experts.grouped_nf4")
    return kernels if state is None or kernels.takes(state) else expert_reference
