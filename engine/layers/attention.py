"""Compute attention over packed samples: one row holds several sequences, and none sees another.

`attend` picks one of four ways:

- On CUDA with a 16-bit dtype it calls torch's variable-length flash attention, one launch for all
  sequences.
- If all sequences have the same length, the row is a plain batch. On Hopper and later, cuDNN's attention computes it 1.9 times
  as fast (H100, 8,192 tokens). It plans each new shape for more than a second, so it gets only multiples of LENGTH_STEP.
- What flash attention lacks, our own kernels compute, on CUDA with a 16-bit dtype: a logit softcap,
  heads of more than FLASH_HEAD features (Gemma 4's global layers have 512), and, in older versions
  of torch, windows and sinks. So they do where they were measured faster (`tiles_are_faster`), and
  where flash attention would take too much memory for many short sequences (`are_many`).
- Elsewhere (CPU, fp32) it calls scaled-dot-product attention for each sequence.

A head may have a sink: one more column of the softmax, which belongs to no token. Its share of the
sum is all that it changes, so flash attention's log-sum-exp is enough to compute it.

`register` adds it to transformers' attention registry under NAME, for layers that run unfused. The
model passes `document_lengths` through.

Shape letters: H query heads, G key/value heads, T tokens of the whole row, L tokens of one
sequence, K head dim.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.kernels import ops
from engine.shape.compute_limits import FLASH_HEAD, LENGTH_STEP, SAMPLE_ROWS

NAME = "packed"
HARMLESS = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
            "logits_to_keep", "output_router_logits",
            "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}  # fmt: skip
"""Keywords that reach attention in some families and do not change what it computes. The last line's say where samples begin."""
HALF = (torch.bfloat16, torch.float16)

try:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn  # torch >= 2.10

    _VARLEN_OPTIONS = set(inspect.signature(varlen_attn).parameters)
except ImportError:
    AuxRequest, varlen_attn, _VARLEN_OPTIONS = None, None, set()


@dataclass(frozen=True)
class Documents:
    """The positions of the samples in a packed row.

    `lengths` are the tokens of each sample, on the host. `offsets` are int32 [documents + 1], on
    the device. Variable-length attention reads only the longest of `lengths`, so these may be upper
    bounds: a CUDA graph replays with other offsets. Bounds end with 0, which no list of lengths does.
    `cache` holds earlier tokens' keys and values, and attends in this module's place while answers
    are generated.
    """

    lengths: tuple[int, ...]
    offsets: Tensor
    cache: Any = None

    @property
    def are_bounds(self) -> bool:
        """Return True if `lengths` are bounds, and the device alone knows where samples begin."""
        return self.lengths[-1] == 0


@dataclass(frozen=True)
class AttentionOptions:
    """The options of attention that differ between model families.

    `scaling` multiplies the scores (None: K ** -0.5), and `softcap` bounds them. `sliding_window`
    is the number of keys that a query sees, its own included.
    """

    scaling: float | None = None
    sliding_window: int | None = None
    softcap: float | None = None


def attend(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    documents: Documents,
    options: AttentionOptions,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Return causal attention within each document, [T, H, K]. Differentiable in q, k and v."""
    if documents.cache is not None:
        return documents.cache.attend(q_THK, k_TGK, v_TGK, documents, options, sinks_H)
    fits = _flash_fits(q_THK, options.softcap) and not are_many(documents.offsets.numel() - 1, q_THK.shape[0])
    if sinks_H is not None and fits and _has_sink_backward():
        return _FlashWithSinks.apply(q_THK, k_TGK, v_TGK, sinks_H.detach().float(), documents, options)
    if sinks_H is None and fits:
        if _is_plain_batch(documents, options) and _cudnn_fits(q_THK):
            return _batched(q_THK, k_TGK, v_TGK, documents, options)
        if not tiles_are_faster(q_THK.shape[-1], options, torch.cuda.get_device_capability(q_THK.device)):
            return _varlen(q_THK, k_TGK, v_TGK, documents, options)
    if q_THK.is_cuda and q_THK.dtype in HALF and q_THK.shape[-1] <= ops.MAX_HEAD:
        return _Tiled.apply(q_THK, k_TGK, v_TGK, sinks_H, documents, options)
    groups = q_THK.shape[1] // k_TGK.shape[1]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_THK, k_TGK, v_TGK))
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
    parts = zip(*(x.split(documents.lengths, dim=2) for x in (q, k, v)))
    out = [_one_document(q, k, v, options, sinks_H) for q, k, v in parts]
    return torch.cat(out, dim=2).squeeze(0).transpose(0, 1)


def register() -> None:
    """Add NAME to transformers' attention registry; a second call changes nothing.

    It has no mask function, so the mask stays None.
    """
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
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Call `attend` by transformers' calling convention; return [1, T, H, K], contiguous.

    s_aux: the heads' sinks. Raises ValueError on whatever else a model asks of its attention:
    dropout, a bias, a mask of its own, attention that is not causal.
    """
    asked = {name for name, value in others.items() if value is not None and name not in HARMLESS}
    asked |= {"dropout"} if dropout else set()
    asked |= {"attention_mask"} if attention_mask is not None else set()
    asked |= {"is_causal = False"} if is_causal is False or getattr(module, "is_causal", True) is False else set()
    if asked:
        raise ValueError(f"packed attention cannot compute {', '.join(sorted(asked))}")
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q_1HTK, k_1GTK, v_1GTK))
    documents = Documents(document_lengths, document_offsets)
    options = AttentionOptions(scaling, sliding_window, softcap)
    return attend(q, k, v, documents, options, s_aux).unsqueeze(0).contiguous(), None


def reads_offsets_only(dtype: torch.dtype) -> bool:
    """Return True if attention on CUDA reads the offsets on the device, whatever its options."""
    return dtype in HALF


def tiles_are_faster(head_dim: int, options: AttentionOptions, capability: tuple[int, int]) -> bool:
    """Return True where our own kernels compute ragged rows faster than flash attention does.

    Measured for heads of 64 features without a window on an H100 (torch 2.11, 32 + 8 heads, 4,096
    tokens): 179 against 305 us forward, 556 against 804 backward. Flash attention 2 does not use
    Hopper's own matrix instructions. Wider heads were equal or slower.
    """
    return head_dim == 64 and options.sliding_window is None and capability[0] == 9


def are_many(num_documents: int, num_tokens: int) -> bool:
    """Return True if flash attention's backward pass would take most of its memory for gaps between samples.

    Samples of 16 tokens take 9 times the memory of one long sample. Our kernels take the same for any.
    """
    return SAMPLE_ROWS * num_documents > 4 * max(num_tokens, 4096)


def _flash_fits(q: Tensor, softcap: float | None) -> bool:
    has_all = "window_size" in _VARLEN_OPTIONS and softcap is None and q.shape[-1] <= FLASH_HEAD
    return q.is_cuda and q.dtype in HALF and has_all


def _is_plain_batch(documents: Documents, options: AttentionOptions) -> bool:
    """Return True if all sequences have one length that is likely to recur."""
    length = documents.lengths[0]
    whole = options.sliding_window is None or options.sliding_window >= length
    return whole and length % LENGTH_STEP == 0 and set(documents.lengths) == {length}


def _cudnn_fits(q: Tensor) -> bool:
    return q.shape[-1] <= 128 and q.shape[-1] % 8 == 0 and torch.cuda.get_device_capability(q.device) >= (9, 0)


def _batched(q: Tensor, k: Tensor, v: Tensor, documents: Documents, options: AttentionOptions) -> Tensor:
    shape = (len(documents.lengths), documents.lengths[0])
    q_BHLK, k_BGLK, v_BGLK = (x.unflatten(0, shape).transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(q_BHLK, k_BGLK, v_BGLK, is_causal=True, scale=options.scaling, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1)


def _varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents, options: AttentionOptions, **more: Any) -> Any:
    keywords: dict[str, Any] = {"scale": options.scaling, "window_size": _window(options), **more}
    if "enable_gqa" in _VARLEN_OPTIONS:
        keywords["enable_gqa"] = q.shape[1] != k.shape[1]
    longest = max(documents.lengths)
    return varlen_attn(q, k, v, documents.offsets, documents.offsets, longest, longest, **keywords)


def _window(options: AttentionOptions) -> tuple[int, int]:
    return (-1 if options.sliding_window is None else options.sliding_window - 1), 0


def _has_sink_backward() -> bool:
    """Return True if torch gives the log-sum-exp, and has the operator that takes another one in the backward pass."""
    return AuxRequest is not None and "return_aux" in _VARLEN_OPTIONS and hasattr(torch.ops.torch_attn, "_varlen_attn_backward")


class _FlashWithSinks(torch.autograd.Function):
    """Compute attention with sinks by flash attention: out * sigmoid(lse - sink).

    With that output, and log(exp(lse) + exp(sink)) as its log-sum-exp, flash attention's own
    backward pass gives the gradients: the sink's value is zero, so it adds nothing to them.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor, documents: Documents, options: AttentionOptions
    ) -> Tensor:
        out_THK, lse_HT = _varlen(q, k, v, documents, options, return_aux=AuxRequest(lse=True))
        out_THK, lse_HT = with_sinks(out_THK, lse_HT, sinks_H)
        ctx.save_for_backward(q, k, v, out_THK, lse_HT, documents.offsets)
        ctx.longest, ctx.options = max(documents.lengths), options
        return out_THK

    @staticmethod
    def backward(ctx: Any, grad_THK: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, offsets = ctx.saved_tensors
        window, scale = _window(ctx.options), ctx.options.scaling
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
        given = (grad_THK.contiguous(), q, k, v, out, lse, offsets, offsets, ctx.longest, ctx.longest, window == (-1, 0), state)
        grads = torch.ops.torch_attn._varlen_attn_backward(*given, scale, list(window))
        return (*grads, None, None, None)


def with_sinks(out_THK: Tensor, lse_HT: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention's output and log-sum-exp after the sinks have joined the softmax."""
    share_TH1 = torch.sigmoid(lse_HT - sinks_H[:, None]).T.unsqueeze(-1)
    return (out_THK * share_TH1).to(out_THK.dtype), torch.logaddexp(lse_HT, sinks_H[:, None].expand_as(lse_HT)).contiguous()


class _Tiled(torch.autograd.Function):
    """Compute attention by our own kernels, with sinks as `_FlashWithSinks` does."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor | None, documents: Documents, options: AttentionOptions
    ) -> Tensor:
        how = q.shape[-1] ** -0.5 if options.scaling is None else options.scaling, options.softcap
        spans_2T = ops.document_spans(documents.offsets, q.shape[0], options.sliding_window)
        out_THK, lse_HT = ops.attention(q, k, v, spans_2T, *how)
        if sinks_H is not None:
            out_THK, lse_HT = with_sinks(out_THK, lse_HT, sinks_H.detach().float())
        ctx.save_for_backward(q, k, v, out_THK, lse_HT, spans_2T)
        longest = max(documents.lengths)
        ctx.how = *how, min(longest, options.sliding_window or longest)
        return out_THK

    @staticmethod
    def backward(ctx: Any, grad_THK: Tensor) -> tuple[Tensor | None, ...]:
        return *ops.attention_backward(grad_THK.contiguous(), *ctx.saved_tensors, *ctx.how), None, None, None


def _one_document(
    q_1HLK: Tensor, k_1HLK: Tensor, v_1HLK: Tensor, options: AttentionOptions, sinks_H: Tensor | None = None
) -> Tensor:
    length, window, softcap = q_1HLK.shape[2], options.sliding_window, options.softcap
    windowed = window is not None and window < length
    if softcap is None and not windowed and sinks_H is None:
        return F.scaled_dot_product_attention(q_1HLK, k_1HLK, v_1HLK, is_causal=True, scale=options.scaling)
    age_LL = torch.arange(length, device=q_1HLK.device)[:, None] - torch.arange(length, device=q_1HLK.device)
    seen_LL = (age_LL >= 0) & (age_LL < window) if windowed else age_LL >= 0
    if softcap is None and sinks_H is None:
        return F.scaled_dot_product_attention(q_1HLK, k_1HLK, v_1HLK, attn_mask=seen_LL, scale=options.scaling)
    scale = options.scaling if options.scaling is not None else q_1HLK.shape[-1] ** -0.5
    scores = (q_1HLK @ k_1HLK.transpose(2, 3)).float() * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen_LL, float("-inf"))
    if sinks_H is not None:
        sinks_1HL1 = sinks_H.detach().float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks_1HL1], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :length]
    return weights.to(v_1HLK.dtype) @ v_1HLK
