"""Define every eight-bit operation in plain torch.

Tests compare the kernels with these functions, and the CPU runs them. `int8_ops` documents the
formulas and checks the arguments. Every sum of codes is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from engine.kernels import reference
from engine.kernels.nf4_state import Nf4State
from engine.kernels.reference import LowRank

GROUP = 64  # elements that one rotation mixes
LARGEST = 127  # of a code; -128 is never used, so that codes are symmetric
# Scale over limit. Devices multiply alike; some replace a division by a product with this, others do not.
INVERSE = 1.0 / LARGEST
SMALLEST_LIMIT = 1e-30  # a row of zeros is scaled as if its largest value were this


@dataclass(frozen=True)
class Int8Rows:
    """Hold a matrix as scale[row] * code. The rows of codes are contiguous and may be strided."""

    codes_NK: Tensor  # int8
    scale_N: Tensor  # fp32, contiguous


@dataclass(frozen=True)
class WeightScales:
    """Hold the scales of a weight, or of several side by side along O: of each row and of each column."""

    row_O: Tensor  # fp32
    column_D: Tensor  # fp32
    is_rotated: bool  # True if row_O is of the rotated weight; column_D never is


def hadamard(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the symmetric, orthogonal matrix H [64, 64] with elements +1/8 and -1/8."""
    h = torch.ones(1, 1, dtype=dtype, device=device)
    while h.shape[0] < GROUP:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h * GROUP**-0.5


def rotated(x_TK: Tensor) -> Tensor:
    """Return x with each group of 64 elements of a row multiplied by H, fp32."""
    h = hadamard(torch.float32, x_TK.device)
    return (x_TK.float().unflatten(1, (-1, GROUP)) @ h).flatten(1)


def weight_scales(states: Sequence[Nf4State], is_rotated: bool) -> WeightScales:
    weights = [_dequantized(state) for state in states]
    rows = [_rotated_weight(state) for state in states] if is_rotated else weights
    row_O = torch.cat([_scale(w.abs().amax(1)) for w in rows])
    return WeightScales(row_O, _scale(torch.stack([w.abs().amax(0) for w in weights]).amax(0)), is_rotated)


def unpack_rows_(states: Sequence[Nf4State], scales: WeightScales, codes_OD: Tensor) -> None:
    values = _rotated_weight if scales.is_rotated else _dequantized
    codes_OD.copy_(_codes(torch.cat([values(state) for state in states]), scales.row_O))


def unpack_columns_(states: Sequence[Nf4State], scales: WeightScales, codes_DO: Tensor) -> None:
    codes_DO.copy_(_codes(torch.cat([_dequantized(state) for state in states]).t(), scales.column_D))


def quantize_rows(x_TK: Tensor, is_rotated: bool) -> Int8Rows:
    wide_TK = rotated(x_TK) if is_rotated else x_TK.float()
    limit_T = wide_TK.abs().nan_to_num(torch.inf, torch.inf).amax(1)
    scale_T = _scale(limit_T)  # infinite for a row that is not finite: times a sum of zeros it gives NaN
    return Int8Rows(_codes(wide_TK.nan_to_num(0.0, 0.0, 0.0), scale_T), scale_T)


def glu_backward_codes_(dh_TF: Tensor, gate_up_TF2: Tensor, activation: str) -> Int8Rows:
    reference.glu_backward_(dh_TF, *gate_up_TF2.chunk(2, dim=1), activation)
    return quantize_rows(gate_up_TF2, is_rotated=False)


def matmul(
    a: Int8Rows, b: Int8Rows, dtype: torch.dtype, term: LowRank | None, bias_N: Tensor | None, firsts: tuple[int, ...] = ()
) -> Tensor:
    sums_TN = (a.codes_NK.double() @ b.codes_NK.double().t()).float()  # below 2^53, so each is exact
    c_TN = sums_TN * a.scale_N[:, None] * b.scale_N
    if term is not None:
        rank, ends = term.b_FR.shape[1], (0, *firsts, term.b_FR.shape[0])
        for i, (first, after) in enumerate(pairwise(ends)):
            c_TN[:, first:after].addmm_(term.low_TR[:, i * rank : (i + 1) * rank].float(), term.b_FR[first:after].float().t())
    return (c_TN if bias_N is None else c_TN + bias_N.float()).to(dtype)


def _dequantized(state: Nf4State) -> Tensor:
    w_OD = torch.empty(state.shape, device=state.packed.device)
    reference.dequantize_nf4_(state, w_OD)
    return w_OD


def _rotated_weight(state: Nf4State) -> Tensor:
    """Return the rotated weight in fp32, from values rounded as tensor cores take them.

    If a group of 64 has one block scale, the values are those of NF4's table in fp16, and the scale
    comes after. Else they are the weight's in bf16.
    """
    w_OD = _dequantized(state)
    if state.block_size % GROUP:
        return rotated(w_OD.bfloat16())
    ones = torch.ones(-(-w_OD.numel() // state.block_size), device=w_OD.device)
    table_OD = _dequantized(replace(state, absmax_M=ones, nested_code=None))
    scale_OD = _dequantized(replace(state, code=torch.ones_like(state.code)))
    return rotated(table_OD.half()) * scale_OD


def _scale(limit: Tensor) -> Tensor:
    return limit.clamp_min(SMALLEST_LIMIT) * INVERSE


def _codes(x_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Return x / scale, rounded once to nearest even, int8 [N, K]. The product is exact in fp64."""
    inverse_N1 = (1.0 / scale_N)[:, None].double()
    return (x_NK.double() * inverse_N1).round().clamp(-LARGEST, LARGEST).to(torch.int8)
