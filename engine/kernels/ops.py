"""Compute the operations around the matmuls of QLoRA training, and attention, forward and backward.

Weights are frozen, so no operation returns a weight gradient. Tensors are bf16, fp16 or fp32, and
arithmetic is in fp32. The functions have no autograd: the caller writes the
`torch.autograd.Function`.

The tensor alone decides which code runs: Triton kernels on CUDA, `engine.kernels.reference`
otherwise. Nothing falls back silently: a CUDA tensor without triton is an EngineError, and so is a
tensor of the wrong layout. `FORCE_TRITON` sends CPU tensors through the kernels too. Only tests set
it, in a process started with TRITON_INTERPRET=1.

Shape letters: T tokens (one flat packed row), D hidden, F MLP hidden, H query heads, G key/value
heads, K head dim. More letters: O output features, R rank, V vocabulary, C rows of logits. Rows may
be strided (slices of a fused buffer). The last dimension is contiguous.
"""

from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType

import torch
from torch import Tensor

from engine.errors import EngineError
from engine.kernels import reference
from engine.kernels.nf4_state import Nf4State, nf4_state
from engine.kernels.reference import IGNORE, LowRank

__all__ = [
    "IGNORE",
    "LowRank", "Nf4State", "add_rms_norm", "attention", "attention_backward", "cross_entropy_", "dequantize_nf4",
    "document_spans", "dropout", "gather_rows", "glu", "glu_backward_", "nf4_state", "noise_of",
    "rms_norm", "rms_norm_backward", "rope_", "row_dots", "row_lengths",
]  # fmt: skip

FORCE_TRITON = False
ACTIVATIONS = ("silu", "gelu_tanh")
MAX_WIDTH = 65_536  # the norm kernels hold a whole row in registers
MAX_HEAD = 512  # features of a head that the attention kernels have tiles for


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0, round_once: bool = False) -> tuple[Tensor, Tensor]:
    """Return y = x * rstd * (offset + weight), [T, D] like x, and rstd, [T] fp32.

    Here rstd = (mean(x^2) + eps)^-1/2. Offset 0 (Llama) rounds the normalised row to x's dtype
    before it multiplies by the weight. Offset 1 (Gemma) and `round_once` (OLMo) round only at the
    end.
    """
    _check_rows("rms_norm", x_TD, weight_D)
    return _family("norm", x_TD).rms_norm(x_TD, weight_D, eps, offset, round_once)


def add_rms_norm(
    x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0, round_once: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return sum = x + scale * delta, rounded to x's dtype, and y, rstd = rms_norm(sum).

    Shapes: sum [T, D], y [T, D], rstd [T] fp32.
    """
    _check_rows("add_rms_norm", x_TD, weight_D, delta_TD)
    return _family("norm", x_TD).add_rms_norm(x_TD, delta_TD, weight_D, eps, offset, round_once, scale)


def rms_norm_backward(
    dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, offset: float = 0.0, residual_TD: Tensor | None = None
) -> Tensor:
    """Return dx = rstd * (g - n * mean(g * n)) + residual, [T, D] like x.

    Here n = x * rstd and g = dy * (offset + weight).
    """
    _check_rows("rms_norm_backward", x_TD, weight_D, dy_TD, *(() if residual_TD is None else (residual_TD,)))
    if rstd_T.shape != x_TD.shape[:1] or rstd_T.dtype != torch.float32 or not rstd_T.is_contiguous():
        raise EngineError(f"rms_norm_backward: rstd {_layout(rstd_T)}: expected contiguous fp32 [{x_TD.shape[0]}]")
    return _family("norm", x_TD).rms_norm_backward(dy_TD, x_TD, weight_D, rstd_T, offset, residual_TD)


def rope_(q_THK: Tensor, k_TGK: Tensor, cos_TR: Tensor, sin_TR: Tensor, inverse: bool = False, pairs: bool = False) -> None:
    """Rotate the first R features of each head of q [T, H, K] and k [T, G, K] in place.

    They become x * cos + rotate_half(x) * sin: feature i turns with feature i + R / 2, or 2i with
    2i + 1 if `pairs`. `inverse` rotates back, which is also the gradient. Both cos and sin [T, R]
    hold the R / 2 angles in their first half; only that is read.
    """
    num_tokens, _, head_dim = q_THK.shape
    for name, x in (("q", q_THK), ("k", k_TGK)):
        is_dense = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == head_dim)  # torch leaves a single head any stride
        if x.shape[0] != num_tokens or x.shape[2] != head_dim or not is_dense:
            raise EngineError(f"rope_: {name} {_layout(x)}: expected [T, heads, K] with dense heads, T and K as in q")
    rotated = cos_TR.shape[-1]
    for name, x in (("cos", cos_TR), ("sin", sin_TR)):
        if x.shape != (num_tokens, rotated) or x.stride(1) != 1 or rotated > head_dim:
            raise EngineError(f"rope_: {name} {_layout(x)}: expected contiguous rows [{num_tokens}, at most {head_dim}]")
    if rotated % 2:
        raise EngineError(f"rope_: {rotated} features that rotate: must be even")
    _family("rope", q_THK).rope_(q_THK, k_TGK, cos_TR, sin_TR, inverse, pairs)


def glu(
    gate_TF: Tensor, up_TF: Tensor, activation: str, gate_add: LowRank | None = None, up_add: LowRank | None = None
) -> Tensor:
    """Return h = act(gate + gate_add) * (up + up_add), [T, F] like gate, rounded once.

    act is "silu" or "gelu_tanh". gate and up stay unchanged: the backward pass takes them with the
    same terms.
    """
    _check_glu("glu", activation, gate_TF, up_TF)
    _check_terms("glu", gate_TF, gate_add=gate_add, up_add=up_add)
    return _family("gated", gate_TF).glu(gate_TF, up_TF, activation, gate_add, up_add)


def glu_backward_(
    dh_TF: Tensor, gate_TF: Tensor, up_TF: Tensor, activation: str,
    gate_add: LowRank | None = None, up_add: LowRank | None = None, dh_add: LowRank | None = None,
) -> None:  # fmt: skip
    """Write in place gate <- d * u * act'(g), up <- d * act(g) and dh <- h = act(g) * u.

    Here g = gate + gate_add, u = up + up_add and d = dh + dh_add, in fp32 and not rounded. Because
    h is computed again, the caller need not save it.
    """
    _check_glu("glu_backward_", activation, gate_TF, up_TF, dh_TF)
    _check_terms("glu_backward_", gate_TF, gate_add=gate_add, up_add=up_add, dh_add=dh_add)
    _family("gated", gate_TF).glu_backward_(dh_TF, gate_TF, up_TF, activation, gate_add, up_add, dh_add)


def cross_entropy_(
    logits_CV: Tensor, labels_C: Tensor, scale: float = 1.0, softcap: float | None = None, with_gradient: bool = True
) -> Tensor:
    """Return loss = logsumexp(z) - z[label], [C] fp32.

    z = scale * logits, or softcap * tanh(scale * logits / softcap) if a softcap is given.
    `with_gradient` overwrites logits <- (softmax(z) - onehot(label)) * dz/dlogits, rounded once;
    otherwise logits stay unchanged. Labels are not checked: they must be in [0, V), or IGNORE,
    which gives loss 0 and gradient 0.
    """
    num_rows, vocabulary = logits_CV.shape if logits_CV.dim() == 2 else (-1, 0)
    if num_rows < 0 or logits_CV.stride(1) != 1 or (num_rows > 1 and logits_CV.stride(0) < vocabulary):
        raise EngineError(f"cross_entropy_: logits {_layout(logits_CV)}: expected [C, V] with contiguous rows that share nothing")
    if labels_C.shape != (num_rows,) or labels_C.dtype != torch.int64 or not labels_C.is_contiguous():
        raise EngineError(f"cross_entropy_: labels {_layout(labels_C)}: expected contiguous int64 [{num_rows}]")
    if softcap is not None and not softcap > 0.0:
        raise EngineError(f"cross_entropy_: softcap = {softcap}: expected a positive number or None")
    return _family("cross_entropy", logits_CV).cross_entropy_(logits_CV, labels_C, scale, softcap, with_gradient)


def document_spans(offsets_N: Tensor, num_tokens: int, window: int | None = None) -> Tensor:
    """Return the first key that each token sees, and the last token that sees it as a key, int32 [2, T].

    Document i begins at offsets[i], the first at 0; what lies behind the last offset is one too. A
    token sees at most `window` keys, its own included. Offsets are read on the device.
    """
    is_list = offsets_N.dim() == 1 and offsets_N.shape[0] and not offsets_N.is_floating_point() and offsets_N.is_contiguous()
    if not is_list or (window is not None and window < 1):
        raise EngineError(f"document_spans: {_layout(offsets_N)}, window {window}: expected dense integers, at least 1 or None")
    return _family("attention.document_attention", offsets_N).document_spans(offsets_N, num_tokens, window)


def attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, spans_2T: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return out = softmax(z) @ v, [T, H, K] like q, and lse = logsumexp(z), [H, T] fp32; z = scale * q @ k, with a
    softcap as in `cross_entropy_`, over the keys from spans[0, t] to t."""
    _check_attention("attention", q_THK, k_TGK, v_TGK, spans_2T, softcap)
    return _family("attention.document_attention", q_THK).attention(q_THK, k_TGK, v_TGK, spans_2T, scale, softcap)


def attention_backward(
    dout_THK: Tensor, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, out_THK: Tensor, lse_HT: Tensor, spans_2T: Tensor,
    scale: float, softcap: float | None = None, longest: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk and dv, contiguous and like q, k and v, from what `attention` returned; no query may see more
    than `longest` keys (None: T), which saves memory."""
    _check_attention("attention_backward", q_THK, k_TGK, v_TGK, spans_2T, softcap)
    like_q, of_lse = (q_THK.shape, q_THK.dtype), (q_THK.shape[1::-1], torch.float32)
    for name, x, (shape, dtype) in (("dout", dout_THK, like_q), ("out", out_THK, like_q), ("lse", lse_HT, of_lse)):
        if x.shape != shape or x.dtype != dtype or not x.is_contiguous():
            raise EngineError(f"attention_backward: {name} {_layout(x)}: expected contiguous {list(shape)} {dtype}")
    given = (dout_THK, q_THK, k_TGK, v_TGK, out_THK, lse_HT, spans_2T, scale, softcap, longest)
    return _family("attention.document_attention", q_THK).attention_backward(*given)


def gather_rows(table_VD: Tensor, ids_T: Tensor) -> Tensor:
    """Return table[ids], [T, D] on the device of the ids.

    The table is on the same device, or in pinned host memory that the GPU reads over PCIe. ids must
    be in [0, V). The kernel gives a row of zeros for an id outside and reads nothing.
    """
    if table_VD.dim() != 2 or table_VD.stride(1) != 1:
        raise EngineError(f"gather_rows: table {_layout(table_VD)}: expected [V, D] with contiguous rows")
    if ids_T.dim() != 1 or ids_T.dtype != torch.int64 or not ids_T.is_contiguous():
        raise EngineError(f"gather_rows: ids {_layout(ids_T)}: expected contiguous int64 [T]")
    if table_VD.device != ids_T.device and not (ids_T.is_cuda and table_VD.is_cpu and table_VD.is_pinned()):
        where = f"table on {table_VD.device}, ids on {ids_T.device}"
        raise EngineError(f"gather_rows: {where}: expected one device, or a table in pinned host memory")
    return _family("gather", ids_T).gather_rows(table_VD, ids_T)


def noise_of(seed: int, rate: float) -> tuple[int, int]:
    """Return the two int64 of `dropout`: the seed, in [0, 2^63), and the share `rate` < 1 of 2^32."""
    return seed, min(round(rate * 2**32), 2**32 - 1)


def dropout(x_TD: Tensor, noise: Tensor, stream: int, in_place: bool = False) -> Tensor:
    """Return x / (1 - rate) where it is kept and 0 elsewhere, [T, D] in x's dtype.

    noise: int64 [2] on x's device, as `noise_of` makes them. An element is dropped if a hash of
    seed, `stream`, row and column is below the second. The same arguments always drop the same
    elements, on every device. stream: a number in [0, 2^31). `in_place` overwrites x.
    """
    if x_TD.dim() != 2 or x_TD.stride(1) != 1:
        raise EngineError(f"dropout: x {_layout(x_TD)}: expected [T, D] with contiguous rows")
    if noise.shape != (2,) or noise.dtype != torch.int64 or not noise.is_contiguous() or noise.device != x_TD.device:
        raise EngineError(f"dropout: noise {_layout(noise)} on {noise.device}: expected contiguous int64 [2] on {x_TD.device}")
    return _family("dropout", x_TD).dropout(x_TD, noise, stream, in_place)


def add_noise_(x_TD: Tensor, bound_T: Tensor, noise: Tensor, stream: int) -> None:
    """Add to each element of row t of x [T, D] a number that is uniform in (-bound_T[t], bound_T[t]).

    bound_T: fp32. noise: as in `dropout`, of which only the seed counts. The same seed, stream, row
    and column always give the same share of the bound, on every device. Rounds once.
    """
    if x_TD.dim() != 2 or x_TD.stride(1) != 1:
        raise EngineError(f"add_noise_: x {_layout(x_TD)}: expected [T, D] with contiguous rows")
    if bound_T.shape != x_TD.shape[:1] or bound_T.dtype != torch.float32 or not bound_T.is_contiguous():
        raise EngineError(f"add_noise_: bound {_layout(bound_T)}: expected contiguous fp32 [{x_TD.shape[0]}]")
    if noise.shape != (2,) or noise.dtype != torch.int64 or not noise.is_contiguous() or noise.device != x_TD.device:
        raise EngineError(f"add_noise_: noise {_layout(noise)} on {noise.device}: expected contiguous int64 [2] on {x_TD.device}")
    _family("dropout", x_TD).add_noise_(x_TD, bound_T, noise, stream)


def dequantize_nf4(
    state: Nf4State, dtype: torch.dtype, out: Tensor | None = None, factors_O: Tensor | None = None
) -> Tensor:
    """Return W [O, D] = code[nibble] * absmax[block], bit-equal to bitsandbytes.

    `out`, if given, is filled and returned: contiguous [O, D] in `dtype`. factors_O: fp32; each row is
    multiplied by its own before it is rounded.
    """
    if out is None:
        out = torch.empty(state.shape, dtype=dtype, device=state.packed.device)
    elif tuple(out.shape) != state.shape or out.dtype != dtype or not out.is_contiguous():
        raise EngineError(f"dequantize_nf4: out {_layout(out)}: expected contiguous {state.shape} {dtype}")
    if factors_O is not None and (factors_O.shape != state.shape[:1] or factors_O.dtype != torch.float32):
        raise EngineError(f"dequantize_nf4: factors {_layout(factors_O)}: expected fp32 [{state.shape[0]}]")
    if math.prod(state.shape):
        _family("nf4", state.packed).dequantize_nf4_(state, out, factors_O)
    return out


def row_lengths(weight: Nf4State | Tensor, a_RD: Tensor, b_OR: Tensor, scaling: float, out_O: Tensor | None = None) -> Tensor:
    """Return the lengths of the rows of W + scaling * B A, fp32 [O]; the product is in A's dtype, sums in fp32.

    weight: W [O, D], plain or packed. b_OR: fp32. `out_O`, if given, is filled and returned.
    """
    first = weight.packed if isinstance(weight, Nf4State) else weight
    if out_O is None:
        out_O = torch.empty(b_OR.shape[0], device=first.device)
    (num_rows, width), rank = tuple(weight.shape), a_RD.shape[0]
    for name, x, shape in (("A", a_RD, (rank, width)), ("B", b_OR, (num_rows, rank)), ("out", out_O, (num_rows,))):
        dtype = a_RD.dtype if name == "A" else torch.float32
        if tuple(x.shape) != shape or x.dtype != dtype or not x.is_contiguous():
            raise EngineError(f"row_lengths: {name} {_layout(x)}: expected contiguous {list(shape)} {dtype}")
    if not first.is_contiguous():
        raise EngineError(f"row_lengths: W {_layout(first)}: expected contiguous rows")
    _family("row_lengths", first).row_lengths_(weight, a_RD, b_OR, scaling, out_O)
    return out_O


def row_dots(weight: Nf4State | Tensor, p_OD: Tensor, first: int, out_O: Tensor) -> None:
    """Write the sums of W times P over the rows of P, fp32, into `out_O`. Row 0 of P belongs to row `first` of W.

    weight: plain or packed, with P's width. p_OD: fp32.
    """
    first_part = weight.packed if isinstance(weight, Nf4State) else weight
    fits = p_OD.shape[1] == weight.shape[1] and 0 <= first <= weight.shape[0] - p_OD.shape[0] and first_part.is_contiguous()
    if not fits or p_OD.dtype != torch.float32 or not p_OD.is_contiguous():
        raise EngineError(f"row_dots: P {_layout(p_OD)} at row {first}: expected fp32 rows of {list(weight.shape)}")
    if out_O.shape != p_OD.shape[:1] or out_O.dtype != torch.float32 or not out_O.is_contiguous():
        raise EngineError(f"row_dots: out {_layout(out_O)}: expected contiguous fp32 [{p_OD.shape[0]}]")
    _family("row_lengths", first_part).row_dots_(weight, p_OD, first, out_O)


def _family(name: str, tensor: Tensor) -> ModuleType:
    """Return the module for `tensor`: engine.kernels.<name> on CUDA, `reference` on the CPU."""
    if tensor.is_cuda:
        # Triton launches on the current device, even if the tensor is on another one.
        if tensor.device.index != torch.cuda.current_device():
            raise EngineError(f"kernels: tensor on {tensor.device}: make that the current device with torch.cuda.set_device")
    elif not FORCE_TRITON:
        return reference
    return load_kernels(name)


@functools.cache
def load_kernels(name: str) -> ModuleType:
    """Return a module of kernels; EngineError without triton."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise EngineError("kernels: CUDA tensors need triton, which failed to import: pip install triton") from error
    return importlib.import_module(f"engine.kernels.{name}")


def _check_rows(op: str, x_TD: Tensor, weight_D: Tensor, *others: Tensor) -> None:
    if x_TD.dim() != 2 or x_TD.stride(1) != 1 or x_TD.shape[1] > MAX_WIDTH:
        raise EngineError(f"{op}: x {_layout(x_TD)}: expected [T, D] with contiguous rows, D at most {MAX_WIDTH}")
    if weight_D.shape != x_TD.shape[1:] or weight_D.stride(0) != 1:
        raise EngineError(f"{op}: weight {_layout(weight_D)}: expected contiguous [{x_TD.shape[1]}]")
    _check_like(op, x_TD, others)


def _check_glu(op: str, activation: str, gate_TF: Tensor, *others: Tensor) -> None:
    if activation not in ACTIVATIONS:
        raise EngineError(f"{op}: activation = {activation!r}: allowed are {', '.join(ACTIVATIONS)}")
    if gate_TF.dim() != 2 or gate_TF.stride(1) != 1:
        raise EngineError(f"{op}: gate {_layout(gate_TF)}: expected [T, F] with contiguous rows")
    _check_like(op, gate_TF, others)


def _check_attention(op: str, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, spans_2T: Tensor, softcap: float | None) -> None:
    (num_tokens, num_heads, head_dim), groups = q_THK.shape, k_TGK.shape[1]
    if head_dim > MAX_HEAD or not groups or num_heads % groups:
        raise EngineError(f"{op}: q {_layout(q_THK)}: expected K of at most {MAX_HEAD} and a multiple of k's {groups} heads")
    for name, x, heads in (("q", q_THK, num_heads), ("k", k_TGK, groups), ("v", v_TGK, groups)):
        if x.shape != (num_tokens, heads, head_dim) or x.dtype != q_THK.dtype or x.stride(2) != 1:
            raise EngineError(f"{op}: {name} {_layout(x)}: expected {[num_tokens, heads, head_dim]} {q_THK.dtype} with dense K")
    if spans_2T.shape != (2, num_tokens) or spans_2T.dtype != torch.int32 or not spans_2T.is_contiguous():
        raise EngineError(f"{op}: spans {_layout(spans_2T)}: expected contiguous int32 [2, {num_tokens}]")
    if softcap is not None and not softcap > 0.0:
        raise EngineError(f"{op}: softcap = {softcap}: expected a positive number or None")


def _check_terms(op: str, x_TF: Tensor, **terms: LowRank | None) -> None:
    for name, term in terms.items():
        if term is None:
            continue
        low, b = term.low_TR, term.b_FR
        ranks = {low.shape[1:], b.shape[1:]}
        fits = low.dim() == 2 and len(ranks) == 1 and (low.shape[0], b.shape[0]) == tuple(x_TF.shape) and low.shape[1] > 0
        if not fits or {low.dtype, b.dtype} != {x_TF.dtype}:
            raise EngineError(f"{op}: {name} {_layout(low)}, {_layout(b)}: expected [T, R] and [F, R] for {_layout(x_TF)}")


def _check_like(op: str, first: Tensor, others: tuple[Tensor, ...]) -> None:
    for other in others:
        if other.shape != first.shape or other.dtype != first.dtype or other.stride(1) != 1:
            raise EngineError(f"{op}: tensor {_layout(other)}: expected contiguous rows like {_layout(first)}")


def _layout(x: Tensor) -> str:
    return f"{list(x.shape)} strides {list(x.stride())} {x.dtype}"
