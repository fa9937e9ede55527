"""Attention over packed samples: several sequences side by side in one row, none seeing another.

Registered in transformers' own attention registry under NAME; the model passes `document_lengths` through. On CUDA with a
16-bit dtype it is torch's variable-length flash attention, one launch for all sequences; elsewhere (CPU, fp32, logit softcap)
it is scaled-dot-product attention sequence by sequence.

Shape letters: H query heads, G key/value heads, T tokens of the whole row, L tokens of one sequence, K head dim.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "packed"

try:
    from torch.nn.attention.varlen import varlen_attn  # torch >= 2.10

    _VARLEN_OPTIONS = set(inspect.signature(varlen_attn).parameters)
except ImportError:
    varlen_attn, _VARLEN_OPTIONS = None, set()


def register() -> None:
    """Add NAME to the registry (idempotent). No mask function goes with it: the mask stays None."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: nn.Module,
    q_1HTK: Tensor,
    k_1GTK: Tensor,
    v_1GTK: Tensor,
    attention_mask: Tensor | None,
    *,
    document_lengths: tuple[int, ...],
    document_offsets: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document; returns [1, T, H, K]. document_offsets: int32 [documents + 1], on the device.

    Raises ValueError on what it cannot do (attention sinks, dropout) rather than computing something else."""
    if dropout or _.get("s_aux") is not None:
        raise ValueError("packed attention has no attention dropout and no attention sinks")
    if _flash_fits(q_1HTK, softcap):
        return _varlen(q_1HTK, k_1GTK, v_1GTK, document_lengths, document_offsets, scaling, sliding_window), None
    groups = q_1HTK.shape[1] // k_1GTK.shape[1]
    k_1HTK, v_1HTK = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k_1GTK, v_1GTK))
    parts = zip(*(x.split(document_lengths, dim=2) for x in (q_1HTK, k_1HTK, v_1HTK)))
    out = [_one_document(q, k, v, scaling, sliding_window, softcap) for q, k, v in parts]
    return torch.cat(out, dim=2).transpose(1, 2), None


def _flash_fits(q: Tensor, softcap: float | None) -> bool:
    half = q.dtype in (torch.bfloat16, torch.float16)
    return varlen_attn is not None and "window_size" in _VARLEN_OPTIONS and q.is_cuda and half and softcap is None


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], offsets: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    q_THK, k_TGK, v_TGK = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1 if window is None else window - 1, 0)}
    if "enable_gqa" in _VARLEN_OPTIONS:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    longest = max(lengths)
    return varlen_attn(q_THK, k_TGK, v_TGK, offsets, offsets, longest, longest, **options).unsqueeze(0)


def _one_document(
    q_1HLK: Tensor, k_1HLK: Tensor, v_1HLK: Tensor, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    length = q_1HLK.shape[2]
    windowed = window is not None and window < length
    if softcap is None and not windowed:
        return F.scaled_dot_product_attention(q_1HLK, k_1HLK, v_1HLK, is_causal=True, scale=scaling)
    age_LL = torch.arange(length, device=q_1HLK.device)[:, None] - torch.arange(length, device=q_1HLK.device)
    seen_LL = (age_LL >= 0) & (age_LL < window) if windowed else age_LL >= 0
    if softcap is None:
        return F.scaled_dot_product_attention(q_1HLK, k_1HLK, v_1HLK, attn_mask=seen_LL, scale=scaling)
    scale = scaling if scaling is not None else q_1HLK.shape[-1] ** -0.5
    scores = softcap * torch.tanh((q_1HLK @ k_1HLK.transpose(2, 3)).float() * scale / softcap)
    weights = torch.softmax(scores.masked_fill(~seen_LL, float("-inf")), dim=-1)
    return weights.to(v_1HLK.dtype) @ v_1HLK
