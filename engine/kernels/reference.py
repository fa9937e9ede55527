"""Define every operation in plain torch.

Tests compare the kernels with these functions, and the CPU runs them. Signatures and formulas are
documented in `engine.kernels.ops`, which also checks the arguments. Arithmetic is in fp32 and
rounds where the formula says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.nf4_state import Nf4State

IGNORE = -100  # label of a row that does not count; torch's ignore_index
SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class LowRank:
    """Hold the term low @ b^T, with the scale already in b.

    Both tensors have the dtype of the operand they are added to, and any strides.
    """

    low_TR: Tensor
    b_FR: Tensor


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0, round_once: bool = False) -> tuple[Tensor, Tensor]:
    x32_TD = x_TD.float()
    rstd_T = torch.rsqrt(x32_TD.square().mean(1) + eps)
    n_TD = x32_TD * rstd_T[:, None]
    if offset == 0.0 and not round_once:
        n_TD = n_TD.to(x_TD.dtype).float()
    return (n_TD * (offset + weight_D.float())).to(x_TD.dtype), rstd_T


def add_rms_norm(
    x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0, round_once: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sum_TD = torch.add(x_TD, delta_TD, alpha=scale)
    return sum_TD, *rms_norm(sum_TD, weight_D, eps, offset, round_once)


def rms_norm_backward(
    dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, offset: float = 0.0, residual_TD: Tensor | None = None
) -> Tensor:
    n_TD = x_TD.float() * rstd_T[:, None]
    g_TD = dy_TD.float() * (offset + weight_D.float())
    dx_TD = rstd_T[:, None] * (g_TD - n_TD * (g_TD * n_TD).mean(1, keepdim=True))
    if residual_TD is not None:
        dx_TD = dx_TD + residual_TD.float()
    return dx_TD.to(x_TD.dtype)


def rope_(q_THK: Tensor, k_TGK: Tensor, cos_TR: Tensor, sin_TR: Tensor, inverse: bool = False, pairs: bool = False) -> None:
    rotated = cos_TR.shape[1]
    half = rotated // 2
    cos = cos_TR[:, None, :half].float()
    sin = sin_TR[:, None, :half].float() * (-1.0 if inverse else 1.0)
    one, other = (slice(0, rotated, 2), slice(1, rotated, 2)) if pairs else (slice(0, half), slice(half, rotated))
    for x in (q_THK, k_TGK):
        # clone: for fp32, float() is a view of the memory written below.
        first, second = x[..., one].float().clone(), x[..., other].float().clone()
        x[..., one] = first * cos - second * sin
        x[..., other] = second * cos + first * sin


def glu(
    gate_TF: Tensor, up_TF: Tensor, activation: str, gate_add: LowRank | None = None, up_add: LowRank | None = None
) -> Tensor:
    act, _ = _activate(_plus(gate_TF, gate_add), activation)
    return (act * _plus(up_TF, up_add)).to(gate_TF.dtype)


def glu_backward_(
    dh_TF: Tensor, gate_TF: Tensor, up_TF: Tensor, activation: str,
    gate_add: LowRank | None = None, up_add: LowRank | None = None, dh_add: LowRank | None = None,
) -> None:  # fmt: skip
    dh, gate, up = _plus(dh_TF, dh_add), _plus(gate_TF, gate_add), _plus(up_TF, up_add)
    act, slope = _activate(gate, activation)
    # Compute all three before the first write: for fp32, float() is a view.
    h, dgate, dup = act * up, dh * up * slope, dh * act
    dh_TF.copy_(h)
    gate_TF.copy_(dgate)
    up_TF.copy_(dup)


def _plus(x_TF: Tensor, term: LowRank | None) -> Tensor:
    """Return x + low @ b^T in fp32."""
    return x_TF.float() if term is None else torch.addmm(x_TF.float(), term.low_TR.float(), term.b_FR.float().t())


def _activate(gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return act(gate) and act'(gate).

    Both activations are gate * sigmoid(s), because (1 + tanh(z)) / 2 = sigmoid(2z). silu has s =
    gate, gelu_tanh has s = 2 sqrt(2 / pi) (gate + 0.044715 gate^3).
    """
    s, ds = gate, 1.0
    if activation == "gelu_tanh":
        s = 2.0 * SQRT_2_OVER_PI * (gate + 0.044715 * gate**3)
        ds = 2.0 * SQRT_2_OVER_PI * (1.0 + 3.0 * 0.044715 * gate**2)
    p = torch.sigmoid(s)
    return gate * p, p + gate * p * (1.0 - p) * ds


def cross_entropy_(
    logits_CV: Tensor, labels_C: Tensor, scale: float = 1.0, softcap: float | None = None, with_gradient: bool = True
) -> Tensor:
    z_CV, slope = logits_CV.float() * scale, scale
    if softcap is not None:
        tanh_CV = torch.tanh(z_CV / softcap)
        z_CV, slope = softcap * tanh_CV, scale * (1.0 - tanh_CV.square())
    counts_C = labels_C != IGNORE
    targets_C1 = torch.where(counts_C, labels_C, 0)[:, None]
    log_p_CV = torch.log_softmax(z_CV, dim=1)
    loss_C = torch.where(counts_C, -log_p_CV.gather(1, targets_C1).squeeze(1), 0.0)
    if with_gradient:
        grad_CV = log_p_CV.exp_()
        grad_CV.scatter_add_(1, targets_C1, torch.full_like(targets_C1, -1.0, dtype=grad_CV.dtype))
        logits_CV.copy_(grad_CV * slope * counts_C[:, None])
    return loss_C


def document_spans(offsets_N: Tensor, num_tokens: int, window: int | None = None) -> Tensor:
    t = torch.arange(num_tokens, device=offsets_N.device)
    edges_N = torch.cat((offsets_N.long(), offsets_N.new_tensor([num_tokens], dtype=torch.int64)))
    document_T = torch.searchsorted(offsets_N.long(), t, right=True)
    first, last = edges_N[document_T - 1], edges_N[document_T] - 1
    if window is not None:
        first, last = torch.maximum(first, t - window + 1), torch.minimum(last, t + window - 1)
    return torch.stack((first, last)).int()


def attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, spans_2T: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    z_HTT, _, v_THK = _attention_scores(q_THK, k_TGK, v_TGK, spans_2T, scale, softcap)
    out_THK = torch.einsum("hts,shk->thk", torch.softmax(z_HTT, -1), v_THK)
    return out_THK.to(q_THK.dtype).contiguous(), torch.logsumexp(z_HTT, -1)


def attention_backward(
    dout_THK: Tensor, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, out_THK: Tensor, lse_HT: Tensor, spans_2T: Tensor,
    scale: float, softcap: float | None = None, longest: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    z_HTT, slope_HTT, v_THK = _attention_scores(q_THK, k_TGK, v_TGK, spans_2T, scale, softcap)
    p_HTT, dout = torch.exp(z_HTT - lse_HT[:, :, None]), dout_THK.float()
    delta_HT1 = (dout * out_THK.float()).sum(-1).t()[:, :, None]
    ds_HTT = p_HTT * (torch.einsum("thk,shk->hts", dout, v_THK) - delta_HT1) * slope_HTT
    group = q_THK.shape[1] // k_TGK.shape[1]
    dq_THK = torch.einsum("hts,shk->thk", ds_HTT, k_TGK.float().repeat_interleave(group, 1))
    dk_THK, dv_THK = (torch.einsum("hts,thk->shk", *pair) for pair in ((ds_HTT, q_THK.float()), (p_HTT, dout)))
    dk_TGK, dv_TGK = (x.unflatten(1, (-1, group)).sum(2) for x in (dk_THK, dv_THK))
    dq, dk, dv = (x.to(q_THK.dtype).contiguous() for x in (dq_THK, dk_TGK, dv_TGK))
    return dq, dk, dv


def _attention_scores(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, spans_2T: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return z, -inf where unseen, its slope in q @ k, and v for each query head, all fp32."""
    group = q_THK.shape[1] // k_TGK.shape[1]
    k_THK, v_THK = (x.float().repeat_interleave(group, 1) for x in (k_TGK, v_TGK))
    z_HTT = scale * torch.einsum("thk,shk->hts", q_THK.float(), k_THK)
    slope_HTT = torch.full_like(z_HTT, scale)
    if softcap is not None:
        tanh_HTT = torch.tanh(z_HTT / softcap)
        z_HTT, slope_HTT = softcap * tanh_HTT, scale * (1.0 - tanh_HTT.square())
    s = torch.arange(q_THK.shape[0], device=q_THK.device)
    seen_TT = (s[None, :] >= spans_2T[0, :, None]) & (s[None, :] <= s[:, None])
    return z_HTT.masked_fill(~seen_TT, float("-inf")), slope_HTT, v_THK


def gather_rows(table_VD: Tensor, ids_T: Tensor) -> Tensor:
    return table_VD.index_select(0, ids_T)


def dequantize_nf4_(state: Nf4State, out: Tensor, factors_O: Tensor | None = None) -> None:
    """Look up both values of each byte at once, in a table of 256 pairs."""
    if factors_O is not None:
        wide_OD = torch.empty(state.shape, device=out.device)
        dequantize_nf4_(state, wide_OD)
        out.copy_(wide_OD.mul_(factors_O[:, None]))
        return
    absmax_M = state.absmax_M
    if state.nested_code is not None:
        scale_M = state.nested_absmax_S.repeat_interleave(state.nested_block_size)[: absmax_M.numel()]
        absmax_M = state.nested_code[absmax_M.int()] * scale_M + state.nested_offset
    numel = out.numel()
    pairs = torch.stack((state.code.repeat_interleave(16), state.code.repeat(16)), 1)
    values = pairs[state.packed.int()].view(-1)[:numel]
    num_whole, rest = divmod(numel, state.block_size)
    flat, whole = out.view(-1), numel - rest
    blocks = values[:whole].view(num_whole, state.block_size)
    flat[:whole] = (blocks * absmax_M[:num_whole, None]).view(-1)
    if rest:
        flat[whole:] = values[whole:] * absmax_M[num_whole]


def row_lengths_(weight: Nf4State | Tensor, a_RD: Tensor, b_OR: Tensor, scaling: float, out_O: Tensor) -> None:
    sum_OD = _wide(weight) + ((scaling * b_OR).to(a_RD.dtype) @ a_RD).float()
    torch.sqrt(sum_OD.square_().sum(1), out=out_O)


def row_dots_(weight: Nf4State | Tensor, p_OD: Tensor, first: int, out_O: Tensor) -> None:
    torch.sum(p_OD * _wide(weight)[first : first + p_OD.shape[0]], 1, out=out_O)


def _wide(weight: Nf4State | Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        return weight.float()
    weight_OD = torch.empty(weight.shape, device=weight.packed.device)
    dequantize_nf4_(weight, weight_OD)
    return weight_OD


def dropout(x_TD: Tensor, noise: Tensor, stream: int, in_place: bool = False) -> Tensor:
    threshold, hashes_TD = noise[1], _hashes(x_TD, noise, stream)
    wide_TD = x_TD if x_TD.dtype == torch.float64 else x_TD.float()
    scale = 2.0**32 / (2.0**32 - threshold.to(wide_TD.dtype))
    kept_TD = torch.where(hashes_TD >= threshold, wide_TD * scale, 0.0).to(x_TD.dtype)
    return x_TD.copy_(kept_TD) if in_place else kept_TD


def add_noise_(x_TD: Tensor, bound_T: Tensor, noise: Tensor, stream: int) -> None:
    wide_TD = x_TD if x_TD.dtype == torch.float64 else x_TD.float()
    shares_TD = ((_hashes(x_TD, noise, stream) >> 9).to(wide_TD.dtype) + 0.5) * 2.0**-22 - 1.0
    x_TD.copy_(wide_TD + shares_TD * bound_T[:, None].to(wide_TD.dtype))


def _hashes(x_TD: Tensor, noise: Tensor, stream: int) -> Tensor:
    """Return 32 bits for each element of x, in int64, from the seed, the stream, row and column."""
    seed = noise[0]
    key = _mix(_mix(_mix(seed & WORD) + (seed >> 32)) + stream)
    row_keys = _mix(key + torch.arange(x_TD.shape[0], device=x_TD.device))[:, None]
    columns = torch.arange(x_TD.shape[1], device=x_TD.device)
    return _mix(_mix(columns + row_keys) ^ _mix(key ^ 0x9E3779B9))


def _mix(h: Tensor) -> Tensor:
    """Return a hash of the low 32 bits of each number, in int64: Wellons' lowbias32, a bijection."""
    h = h & WORD
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & WORD
    h = ((h ^ (h >> 15)) * 0x846CA68B) & WORD  # the product wraps, and its low 32 bits are right
    return h ^ (h >> 16)
