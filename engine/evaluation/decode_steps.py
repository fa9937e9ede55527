"""Compute the logits of a batch of answers: those behind the prompts, then a token of each a pass.

With the fused layers the prompts are one packed row. A pass of one token each is a packed row too,
of samples of one token, at their own positions. Only attention differs: it writes the new keys and
values into a table [B, G, L, K] and reads the whole of it behind a mask. So no prompt is padded. On
CUDA the pass is recorded once for a batch and replayed, because a small model waits for its host.

Shape letters: B answers at once, T tokens of all prompts, L places of the longest answer's context,
H query heads, G key/value heads, R query heads of one of them, K head dim, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.adapter.lora import LoraLinear
from engine.layers.attention import AttentionOptions, Documents, attend
from engine.layers.structure import AttentionSpec
from engine.layers.swap import FusedLayer, mixers
from engine.model.base import Base, rotates_by_row
from engine.model.device import capture
from engine.quant.matrices import merged_weight

PLACES_STEP = 64  # the table's length, so that attention finds whole tiles
EAGER_STEPS = 2  # before a recording: they compile kernels and choose the vendor's
Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]


def can_decode(base: Base, longest: int) -> bool:
    """Return True if the fused layers can generate contexts of up to `longest` tokens.

    Layers that carry a state, share keys with others, read an embedding of their own or count
    positions within a row cannot.
    """
    if base.swaps.unfused or not base.route.packed_attention or not base.route.head_loss or mixers(base.model):
        return False
    specs = [layer.spec for layer in base.model.modules() if isinstance(layer, FusedLayer)]
    return not rotates_by_row(base.model.config.get_text_config(), longest) and all(
        isinstance(spec.attention, AttentionSpec)
        and not (spec.attention.reads or spec.attention.stores or spec.attention.query_scale)
        and (spec.tail is None or spec.tail.norm is None)
        for spec in specs
    )


class KeyValues:
    """Hold the keys and values of all layers, each [B, G, L, K].

    Layers call `attend` in their order. What a place held before its row reached it is masked, and
    must be finite: tables begin as zeros.
    """

    def __init__(self, num_rows: int, num_places: int) -> None:
        self._num_rows, self._num_places = num_rows, num_places
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._at: tuple[Tensor, Tensor] | None = None
        self._masks: dict[int | None, Tensor] = {}
        self._next = 0
        self._is_prompt = True

    def begin(self, rows: Tensor, places: Tensor, is_prompt: bool) -> None:
        """Begin a pass. rows, places: of each token. is_prompt: whether they are whole prompts."""
        self._at, self._is_prompt, self._next = (rows, places), is_prompt, 0
        self._masks.clear()

    def attend(
        self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, documents: Documents, options: AttentionOptions,
        sinks_H: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Store the keys and values of the next layer, and return attention [T, H, K]."""
        layer, self._next = self._next, self._next + 1
        if layer == len(self._tables):
            shapes = [(self._num_rows, x.shape[1], self._num_places, x.shape[2]) for x in (k_TGK, v_TGK)]
            self._tables.append(tuple(torch.zeros(shape, dtype=q_THK.dtype, device=q_THK.device) for shape in shapes))
        k_BGLK, v_BGLK = self._tables[layer]
        rows, places = self._at
        k_BGLK[rows, :, places], v_BGLK[rows, :, places] = k_TGK, v_TGK
        if self._is_prompt:
            return attend(q_THK, k_TGK, v_TGK, Documents(documents.lengths, documents.offsets), options, sinks_H)
        q_BGRK = q_THK.unflatten(1, (k_TGK.shape[1], -1))
        mask = self._mask(options.sliding_window, q_THK.dtype)
        return _attend_table(q_BGRK, k_BGLK, v_BGLK, mask, options, sinks_H).flatten(1, 2)

    def keep(self, rows: Tensor) -> KeyValues:
        """Return the tables of these rows alone."""
        kept = KeyValues(len(rows), self._num_places)
        kept._tables = [(k[rows], v[rows]) for k, v in self._tables]
        return kept

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return 0 for keys that a row sees, and -inf for others [B, 1, 1, L]."""
        if window not in self._masks:
            place_B1, key_L = self._at[1][:, None], torch.arange(self._num_places, device=self._at[1].device)
            hidden_BL = key_L > place_B1
            if window is not None:
                hidden_BL |= key_L <= place_B1 - window
            zeros_BL = torch.zeros(hidden_BL.shape, dtype=dtype, device=hidden_BL.device)
            self._masks[window] = zeros_BL.masked_fill_(hidden_BL, -torch.inf)[:, None, None]
        return self._masks[window]


def _attend_table(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: AttentionOptions, sinks_H: Tensor | None = None
) -> Tensor:
    """Return attention of one query a row, [B, G, R, K]."""
    if options.softcap is None and sinks_H is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(-1, *q.shape[1:3], -1), scale=options.scaling)
    scale = q.shape[-1] ** -0.5 if options.scaling is None else options.scaling
    scores = (q @ k.transpose(2, 3)).float() * scale
    scores = mask + (scores if options.softcap is None else options.softcap * torch.tanh(scores / options.softcap))
    if sinks_H is None:
        return scores.softmax(-1).to(v.dtype) @ v
    sinks_GR1 = sinks_H.detach().float().view(*q.shape[1:3], 1).expand(*q.shape[:3], 1)
    return torch.cat([scores, sinks_GR1], dim=-1).softmax(-1)[..., :-1].to(v.dtype) @ v


class FusedSteps:
    """Compute the logits of a batch of answers, pass after pass.

    `leave_at`: rows that have ended should leave once no more than this share goes on.
    """

    def __init__(self, base: Base, prompts: Sequence[np.ndarray], max_new_tokens: int, record: Capture | None = None) -> None:
        """Prepare a batch. prompts: token ids of each. record: records a pass; None computes each anew."""
        self._base, self._prompts, self._record = base, prompts, record
        lengths = [len(prompt) for prompt in prompts]
        places = max(lengths) + max_new_tokens
        self._cache = KeyValues(len(prompts), -(-places // PLACES_STEP) * PLACES_STEP)
        self._lengths_B = torch.tensor(lengths, device=base.device)
        self._head = base.head()
        self.leave_at = 0.75 if record is None else 0.5  # a smaller batch is recorded anew
        self._start_batch(torch.zeros_like(self._lengths_B), self._lengths_B)

    def prompt_logits(self) -> Tensor:
        """Return the logits [B, V] behind each prompt."""
        device, lengths = self._base.device, [len(prompt) for prompt in self._prompts]
        ids_T = torch.from_numpy(np.concatenate(self._prompts).astype(np.int64)).to(device)
        places_T = torch.cat([torch.arange(length) for length in lengths]).to(device)
        rows_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
        offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
        self._cache.begin(rows_T, places_T, is_prompt=True)
        hidden_TD = self._hidden(ids_T, places_T, tuple(lengths), offsets)
        return self._logits(hidden_TD[offsets[1:].long() - 1])

    def next_logits(self, tokens_B: Tensor) -> Tensor:
        """Return the logits [B, V] behind one more token of each answer. Valid until the next call."""
        self._tokens_B.copy_(tokens_B)
        if self._replay is not None:
            self._replay()
        elif self._record is None or self._num_steps < EAGER_STEPS:
            self._result = self._step()
        else:
            self._result, self._replay = self._recorded()
            if self._replay is None:
                self._result = self._step()
            else:
                self._replay()
        self._num_steps += 1
        self._places_B.add_(1)
        return self._result

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch alone."""
        self._cache = self._cache.keep(rows)
        self._start_batch(self._tokens_B[rows], self._places_B[rows])

    def _start_batch(self, tokens_B: Tensor, places_B: Tensor) -> None:
        """Set the tensors that a recording reads, in new memory."""
        self._tokens_B, self._places_B = tokens_B.clone(), places_B.clone()
        self._rows_B = torch.arange(len(places_B), device=places_B.device)
        self._offsets = torch.arange(len(places_B) + 1, dtype=torch.int32, device=places_B.device)
        self._replay: Callable[[], None] | None = None
        self._result: Tensor | None = None
        self._num_steps = 0

    def _recorded(self) -> tuple[Tensor | None, Callable[[], None] | None]:
        try:
            return self._record(self._step)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # the model's code waits for the device
            self._record = None
            return None, None

    def _step(self) -> Tensor:
        self._cache.begin(self._rows_B, self._places_B, is_prompt=False)
        ones = (1,) * len(self._rows_B)
        return self._logits(self._hidden(self._tokens_B, self._places_B, ones, self._offsets))

    def _hidden(self, ids_T: Tensor, places_T: Tensor, lengths: tuple[int, ...], offsets: Tensor) -> Tensor:
        output = self._base.model.get_decoder()(
            input_ids=ids_T[None], position_ids=places_T[None], document_lengths=lengths, document_offsets=offsets,
            document_cache=self._cache, use_cache=False,
        )  # fmt: skip
        return output.last_hidden_state.squeeze(0)

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        head = self._head
        logits_BV = head.logits(hidden_BD).float() * head.scale
        return logits_BV if head.softcap is None else head.softcap * torch.tanh(logits_BV / head.softcap)


class PaddedSteps:
    """Compute the logits of a batch of answers with the library's layers and cache."""

    leave_at = 0.75  # rows that have ended leave once no more than this share goes on

    def __init__(self, base: Base, ids_BP: Tensor, mask_BP: Tensor) -> None:
        from transformers import DynamicCache

        self._model, self._ids, self._mask = base.model, ids_BP, mask_BP
        self._positions = (mask_BP.cumsum(1) - 1).clamp(min=0)
        self._cache = DynamicCache(config=base.model.config.get_text_config())

    def prompt_logits(self) -> Tensor:
        """Return the logits [B, V] behind each prompt."""
        given = {"input_ids": self._ids, "attention_mask": self._mask, "position_ids": self._positions}
        return self._model(**given, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def next_logits(self, tokens_B: Tensor) -> Tensor:
        """Return the logits [B, V] behind one more token of each answer."""
        self._ids, self._positions = tokens_B[:, None], self._positions[:, -1:] + 1
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], 1)
        return self.prompt_logits()

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch alone."""
        self._cache.batch_select_indices(rows)
        self._mask, self._positions = self._mask[rows], self._positions[rows]


def recorder(base: Base) -> Capture | None:
    """Return what records a pass, and how to replay it; None where nothing can be recorded."""
    return (lambda compute: capture(compute, torch.cuda.graph_pool_handle())) if base.device.type == "cuda" else None


class MergedWeights:
    """Hold weights of fused layers dequantised, as many as fit: each pass would dequantise them again.

    Those that a plan keeps already stay as they are.
    """

    def __init__(self, base: Base, num_bytes: float) -> None:
        self._added: list[tuple[FusedLayer, str]] = []
        for layer in base.model.modules():
            for group, members in layer.projections().items() if isinstance(layer, FusedLayer) else ():
                bases = [member.base if isinstance(member, LoraLinear) else member for member in members]
                num_bytes -= base.dtype.itemsize * sum(one.in_features * one.out_features for one in bases)
                if num_bytes < 0:
                    return
                if group not in layer.weight_cache and all(one.is_packed for one in bases):
                    try:
                        layer.weight_cache[group] = merged_weight(bases, base.dtype)
                    except torch.OutOfMemoryError:  # the process has a limit of its own
                        return
                    self._added.append((layer, group))

    def __bool__(self) -> bool:
        return bool(self._added)

    def drop(self) -> None:
        """Drop them, which leaves the layers as they were."""
        for layer, group in self._added:
            layer.weight_cache.pop(group, None)
        self._added.clear()
