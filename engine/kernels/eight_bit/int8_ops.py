"""Multiply by frozen NF4 weights in eight bits, with one scale for each row of both operands.

A product reduces over K, and both operands are stored with K contiguous: y = x W^T takes the codes
of W [O, D], and dx = dy W those of W^T [D, O]. `unpack_rows` and `unpack_columns` write them from
the packed weight, with no 16-bit copy in between. Scales are made once for each weight.

A rotation multiplies each group of 64 elements along K by a Hadamard matrix H, which spreads
outliers. H H^T = 1, so a product of two rotated operands is the product of the operands.

Operands are never saturated silently: a row of x with a NaN or an infinity gives a row of the
product that is not finite. A row of zeros gives zeros.

As in `engine.kernels.ops`, the tensor alone decides which code runs: Triton on CUDA, plain torch on
the CPU. Shape letters: T tokens, D input features, O output features, R rank, K what a product
reduces over, N rows of the second operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from engine.errors import EngineError
from engine.kernels import ops
from engine.kernels.eight_bit import int8_reference
from engine.kernels.eight_bit.int8_reference import GROUP, Int8Rows, WeightScales
from engine.kernels.nf4_state import Nf4State
from engine.kernels.reference import LowRank

__all__ = [
    "GROUP", "Int8Rows", "WeightScales", "can_split", "glu_backward_codes_", "matmul", "quantize_rows",
    "unpack_columns", "unpack_rows", "weight_scales",
]  # fmt: skip

LONGEST = 131_072  # elements of a row: 127^2 times as many stay below 2^31
WIDEST = 65_536  # elements of a row to quantise, which a program holds in registers
HIGHEST_RANK = 256
MOST_LAYERS, STEP = 3, 256  # side by side with terms of their own; columns of the widest tile


def weight_scales(states: Sequence[Nf4State], is_rotated: bool = False) -> WeightScales:
    """Return the scales of weights side by side along O, each [O_i, D]: largest |w| / 127, fp32.

    row_O [sum of O_i] is of the rotated weight if `is_rotated`, and column_D [D] of the plain one.
    """
    _check_states("weight_scales", states, is_rotated)
    return _module("unpacking", states[0].packed).weight_scales(states, is_rotated)


def unpack_rows(states: Sequence[Nf4State], scales: WeightScales) -> Int8Rows:
    """Return W [O, D] in codes, one scale for each output feature; rotated along D if the scales are."""
    _check_states("unpack_rows", states, scales.is_rotated)
    _check_scales("unpack_rows", states, scales)
    codes_OD = _empty(states, transposed=False)
    _module("unpacking", codes_OD).unpack_rows_(states, scales, codes_OD)
    return Int8Rows(codes_OD, scales.row_O)


def unpack_columns(states: Sequence[Nf4State], scales: WeightScales) -> Int8Rows:
    """Return W^T [D, O] in codes, one scale for each input feature, never rotated."""
    _check_states("unpack_columns", states, False)
    _check_scales("unpack_columns", states, scales)
    codes_DO = _empty(states, transposed=True)
    _module("unpacking", codes_DO).unpack_columns_(states, scales, codes_DO)
    return Int8Rows(codes_DO, scales.column_D)


def quantize_rows(x_TK: Tensor, is_rotated: bool = False) -> Int8Rows:
    """Return x [T, K] in codes: x / scale rounded to nearest even, scale = largest |x| of the row / 127.

    x is bf16, fp16 or fp32, with contiguous rows that may be strided. `is_rotated` rotates the rows
    first, in fp32. K is then a multiple of 64.
    """
    if x_TK.dim() != 2 or x_TK.stride(1) != 1 or not 0 < x_TK.shape[1] <= WIDEST or not x_TK.is_floating_point():
        raise EngineError(f"quantize_rows: x {_layout(x_TK)}: expected [T, K] of floats, contiguous rows, K from 1 to {WIDEST}")
    if is_rotated and x_TK.shape[1] % GROUP:
        raise EngineError(f"quantize_rows: K = {x_TK.shape[1]}: a rotation needs a multiple of {GROUP}")
    return _module("row_codes", x_TK).quantize_rows(x_TK, is_rotated)


def glu_backward_codes_(dh_TF: Tensor, gate_up_TF2: Tensor, activation: str) -> Int8Rows:
    """Write in place gate | up <- dgate | dup and dh <- h, as `ops.glu_backward_` does, and return `quantize_rows(dgate | dup)`.

    dh [T, F] and gate | up [T, 2 F] are of one float dtype and have contiguous rows, which may be strided.
    """
    (num_tokens, width), of_both = dh_TF.shape if dh_TF.dim() == 2 else (-1, 0), (gate_up_TF2.dtype, gate_up_TF2.stride(-1))
    expected = gate_up_TF2.shape == (num_tokens, 2 * width) and of_both == (dh_TF.dtype, 1) and dh_TF.stride(-1) == 1
    if not expected or not 0 < 2 * width <= WIDEST or not dh_TF.is_floating_point() or activation not in ops.ACTIVATIONS:
        given = f"{activation!r}, dh {_layout(dh_TF)}, gate | up {_layout(gate_up_TF2)}"
        wanted = f"one of {ops.ACTIVATIONS}, [T, F] and [T, 2 F] of one float dtype, contiguous rows, 2 F from 2 to {WIDEST}"
        raise EngineError(f"glu_backward_codes_: {given}: expected {wanted}")
    return _module("gradient_codes", dh_TF).glu_backward_codes_(dh_TF, gate_up_TF2, activation)


def matmul(
    a: Int8Rows,
    b: Int8Rows,
    dtype: torch.dtype,
    term: LowRank | None = None,
    bias_N: Tensor | None = None,
    firsts: tuple[int, ...] = (),
) -> Tensor:
    """Return c = a b^T + low @ low_b^T + bias, [T, N] in `dtype`, rounded once.

    a: [T, K]; b: [N, K]. The sum over codes is exact; the rest is in fp32. `term` holds low [T, R]
    and low_b [N, R] in `dtype`, any strides, R at most 256: the adapter's part. bias [N] is of any
    float dtype.

    firsts: where rows of b belong to two or three layers side by side, the first row of each but
    the first, multiples of STEP. low is then [T, M R], and each of the M layers has R of its columns.
    """
    codes_a, codes_b = a.codes_NK, b.codes_NK
    _check_codes("a", codes_a, a.scale_N)
    _check_codes("b", codes_b, b.scale_N)
    (num_tokens, reduced), (num_columns, other) = codes_a.shape, codes_b.shape
    if reduced != other or not 0 < reduced <= LONGEST:
        raise EngineError(f"matmul: K = {reduced} and {other}: expected the same, from 1 to {LONGEST}")
    if term is not None:
        low, low_b, rank = term.low_TR, term.b_FR, term.b_FR.shape[-1]
        wide = rank * (1 + len(firsts))
        fits = low.shape == (num_tokens, wide) and low_b.shape == (num_columns, rank) and low.dtype == low_b.dtype == dtype
        if not fits or not 0 < rank <= HIGHEST_RANK:
            wanted = f"[{num_tokens}, {1 + len(firsts)} R] and [{num_columns}, R] {dtype}, R from 1 to {HIGHEST_RANK}"
            raise EngineError(f"matmul: term {_layout(low)}, {_layout(low_b)}: expected {wanted}")
    if not can_split(num_columns, firsts):
        raise EngineError(f"matmul: firsts {firsts}: expected at most {MOST_LAYERS - 1}, ascending multiples of {STEP}")
    if bias_N is not None and (bias_N.shape != (num_columns,) or not bias_N.is_contiguous()):
        raise EngineError(f"matmul: bias {_layout(bias_N)}: expected contiguous [{num_columns}]")
    return _module("int8_matmul", a.codes_NK).matmul(a, b, dtype, term, bias_N, firsts)


def can_split(num_columns: int, firsts: tuple[int, ...]) -> bool:
    """Return True if `matmul` takes these first rows of layers side by side."""
    ends = (0, *firsts, num_columns)
    ascends = all(first < after for first, after in pairwise(ends))
    return len(firsts) < MOST_LAYERS and not any(first % STEP for first in firsts) and (ascends or not firsts)


def _module(name: str, tensor: Tensor) -> ModuleType:
    found = ops._family(f"eight_bit.{name}", tensor)
    return int8_reference if found is ops.reference else found


def _check_codes(name: str, codes_NK: Tensor, scale_N: Tensor) -> None:
    if codes_NK.dim() != 2 or codes_NK.dtype != torch.int8 or codes_NK.stride(1) != 1:
        raise EngineError(f"matmul: codes of {name} {_layout(codes_NK)}: expected int8 [N, K] with contiguous rows")
    if scale_N.shape != codes_NK.shape[:1] or scale_N.dtype != torch.float32 or not scale_N.is_contiguous():
        raise EngineError(f"matmul: scale of {name} {_layout(scale_N)}: expected contiguous fp32 [{codes_NK.shape[0]}]")


def _empty(states: Sequence[Nf4State], transposed: bool) -> Tensor:
    shape = sum(state.shape[0] for state in states), states[0].shape[1]
    return torch.empty(shape[::-1] if transposed else shape, dtype=torch.int8, device=states[0].packed.device)


def _check_states(op: str, states: Sequence[Nf4State], is_rotated: bool) -> None:
    shapes = [tuple(state.shape) for state in states]
    if not shapes or {len(shape) for shape in shapes} != {2} or len({shape[1] for shape in shapes}) != 1:
        raise EngineError(f"{op}: weights {shapes}: expected at least one, each [O, D] with the same D")
    if is_rotated and shapes[0][1] % GROUP:
        raise EngineError(f"{op}: D = {shapes[0][1]}: a rotation needs a multiple of {GROUP}")


def _check_scales(op: str, states: Sequence[Nf4State], scales: WeightScales) -> None:
    expected = (sum(state.shape[0] for state in states),), (states[0].shape[1],)
    if (scales.row_O.shape, scales.column_D.shape) != expected:
        raise EngineError(f"{op}: scales {_layout(scales.row_O)}, {_layout(scales.column_D)}: expected {expected}")


def _layout(x: Tensor) -> str:
    return f"{list(x.shape)} strides {list(x.stride())} {x.dtype}"
