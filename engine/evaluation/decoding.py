"""Generate answers to many prompts at once, with a key-value cache, under the adapter that is attached.

Fused layers compute it where they can (decode_steps.py). Elsewhere the model's own layers do, and
the fused ones come back afterwards: prompts of like length share a batch, padded on the left, and a
mask keeps padding out of every sum. Layers that carry a state, and models that keep their own
attention, get prompts of equal length alone, and the library's own loop. Rows that have ended leave
the batch.

Shape letters: B answers at once, P tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from engine.evaluation.decode_steps import FusedSteps, MergedWeights, PaddedSteps, can_decode, recorder
from engine.layers.swap import FusedLayer, FusedNorm, mixers, restore_layers
from engine.model.base import Base, end_tokens
from engine.model.comparison import own_attentions
from engine.model.device import free, host_share_gib, one_thread
from engine.model.pretrained import text_attention
from engine.quant.frozen_linear import FrozenLinear
from engine.units import GIB

MAX_PROMPT_TOKENS = 2**14  # in one forward pass
PLAIN_SHARE = 0.5  # of the free memory, for dequantised weights


@dataclass(frozen=True)
class Decoding:
    """Say how answers are made. temperature: 0 takes the likeliest token. seed: of the draws above 0.

    An answer's draws depend on the seed and its place among the prompts, not on its batch.
    """

    max_new_tokens: int
    batch_size: int = 32
    temperature: float = 0.0
    seed: int = 0


def stop_tokens(base: Base, answers: Sequence[np.ndarray]) -> list[int]:
    """Return the tokens that end an answer: the model's own, and special ones that end answers in the data."""
    special = set(base.tokenizer.all_special_ids)
    return list(dict.fromkeys([*end_tokens(base), *sorted({int(ids[-1]) for ids in answers if len(ids)} & special)]))


def generate(
    base: Base,
    prompts: Sequence[np.ndarray],
    stops: Sequence[int],
    how: Decoding,
    before_each: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Return the token ids of each answer, without the stop token.

    prompts: token ids [P] of each. before_each: called before each step; an exception from it ends
    the generation. If memory runs out, fewer answers are made at once. The model is afterwards as
    it was. Raises torch.OutOfMemoryError if not even one answer fits.
    """
    was_training, longest = base.model.training, max(map(len, prompts), default=0) + how.max_new_tokens
    base.model.eval()
    try:
        if can_decode(base, longest):
            weights = MergedWeights(base, _room(base))
            try:
                return _Generation(base, prompts, stops, how, before_each, weights).answers()
            finally:
                weights.drop()
        with _own_attention(base), original_layers(base.model):
            base.model.eval()
            return _Generation(base, prompts, stops, how, before_each, _PlainWeights(base, _room(base))).answers()
    finally:
        base.model.train(was_training)
        if base.device.type == "cuda":
            torch.cuda.empty_cache()  # a recording's memory serves nothing else


@contextmanager
def _own_attention(base: Base) -> Iterator[None]:
    """Set an attention of the library inside, and that of training afterwards. Drop dequantised weights at the end."""
    config, wanted = base.model.config, own_attentions(base.model)[0] if base.route.packed_attention else base.route.attention
    try:
        base.model.set_attn_implementation(text_attention(config, wanted))
        yield
    finally:
        base.model.set_attn_implementation(text_attention(config, base.route.attention))
        _PlainWeights.drop_all(base)


@contextmanager
def original_layers(model: nn.Module) -> Iterator[None]:
    """Undo `fuse_layers` inside this context. The same fused layers return, with all that they keep."""
    decoder = model.get_decoder()
    fused = [(name, one) for name, one in decoder.named_modules() if isinstance(one, FusedLayer | FusedNorm)]
    restore_layers(model)
    try:
        yield
    finally:
        for name, one in fused:
            one.replaced[0].train(model.training)
            decoder.set_submodule(name, one)


class _Generation:
    """Make the answers to some prompts. weights: those held dequantised, which go first if memory runs out."""

    def __init__(
        self,
        base: Base,
        prompts: Sequence[np.ndarray],
        stops: Sequence[int],
        how: Decoding,
        before_each: Callable[[], None],
        weights: MergedWeights | _PlainWeights,
    ) -> None:
        self._base, self._prompts, self._stops, self._how, self._before_each = base, prompts, set(stops), how, before_each
        self._weights, self._is_fused = weights, isinstance(weights, MergedWeights)
        self._pad = stops[0] if stops else 0
        self._pads = base.route.packed_attention and not base.route.boundaries and not has_mixers_below(base)
        self._answers: list[list[int]] = [[] for _ in prompts]

    @torch.no_grad()
    def answers(self) -> list[list[int]]:
        size = self._how.batch_size
        waiting = sorted(range(len(self._prompts)), key=lambda i: (-len(self._prompts[i]), i))
        while waiting:
            rows = self._next_rows(waiting, size)
            try:
                self._answer(rows)
            except torch.OutOfMemoryError:
                if size == 1 and not self._weights:
                    raise
                size = max(1, len(rows) // 2)
                self._answers = [answer if i not in rows else [] for i, answer in enumerate(self._answers)]
            else:
                waiting = waiting[len(rows) :]
                continue
            self._weights.drop()  # outside the block, whose traceback keeps tensors alive
            free(self._base.device)
        return self._answers

    def _next_rows(self, waiting: list[int], size: int) -> list[int]:
        longest = len(self._prompts[waiting[0]])
        rows = waiting[: max(1, min(size, MAX_PROMPT_TOKENS // longest))]
        return rows if self._is_fused or self._pads else [i for i in rows if len(self._prompts[i]) == longest]

    def _answer(self, rows: list[int]) -> None:
        prompts = [self._prompts[i] for i in rows]
        if self._is_fused:
            self._decode(rows, FusedSteps(self._base, prompts, self._how.max_new_tokens, recorder(self._base)))
        elif self._pads:
            self._decode(rows, PaddedSteps(self._base, *self._padded(prompts)))
        else:
            self._by_library(rows, *self._padded(prompts))

    def _padded(self, prompts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Return the prompts and their mask [B, P], padded on the left."""
        width = max(map(len, prompts))
        ids_BP = torch.full((len(prompts), width), self._pad, dtype=torch.long)
        mask_BP = torch.zeros_like(ids_BP)
        for row, prompt in enumerate(prompts):
            ids_BP[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask_BP[row, width - len(prompt) :] = 1
        return ids_BP.to(self._base.device), mask_BP.to(self._base.device)

    def _decode(self, rows: list[int], steps: FusedSteps | PaddedSteps) -> None:
        draws, going, tokens_B = self._draws(rows), list(range(len(rows))), None
        kept = list(going)  # rows of the batch, of which some may have ended
        for step in range(self._how.max_new_tokens):
            self._before_each()
            logits_BV = steps.prompt_logits() if tokens_B is None else self._next_logits(steps, tokens_B)
            tokens_B = self._pick(logits_BV, None if draws is None else draws[kept, step])
            going = self._take(rows, kept, tokens_B.tolist(), going)
            if not going:
                return
            if len(going) <= steps.leave_at * len(kept):
                places = torch.tensor([kept.index(row) for row in going], device=tokens_B.device)
                steps.keep(places)
                tokens_B, kept = tokens_B[places], list(going)

    def _next_logits(self, steps: FusedSteps | PaddedSteps, tokens_B: Tensor) -> Tensor:
        with one_thread() if self._base.device.type == "cpu" else nullcontext():  # two took five times the processor time
            return steps.next_logits(tokens_B)

    def _take(self, rows: list[int], kept: list[int], tokens: list[int], going: list[int]) -> list[int]:
        """Add each row's token to its answer. Return the rows that go on."""
        alive, left = set(going), []
        for row, token in zip(kept, tokens, strict=True):
            if row in alive and token not in self._stops:
                self._answers[rows[row]].append(token)
                left.append(row)
        return left

    def _pick(self, logits_BV: Tensor, draws_B: np.ndarray | None) -> Tensor:
        if draws_B is None:
            return logits_BV.argmax(-1)
        sums_BV = (logits_BV.float() / self._how.temperature).softmax(-1).cumsum(-1)
        at_B = torch.from_numpy(draws_B).to(sums_BV.device, torch.float32) * sums_BV[:, -1]
        return torch.searchsorted(sums_BV, at_B[:, None]).squeeze(1).clamp(max=logits_BV.shape[-1] - 1)

    def _draws(self, rows: list[int]) -> np.ndarray | None:
        """Return numbers from 0 to 1 [B, max_new_tokens]; None if no token is drawn."""
        if self._how.temperature == 0:
            return None
        return np.stack([np.random.default_rng([self._how.seed, i]).random(self._how.max_new_tokens) for i in rows])

    def _by_library(self, rows: list[int], ids_BP: Tensor, mask_BP: Tensor) -> None:
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        draws, width = self._draws(rows), ids_BP.shape[1]

        def asked_each(ids: Tensor, scores: Tensor, **_: object) -> Tensor:
            self._before_each()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        def drawn(ids: Tensor, scores: Tensor) -> Tensor:
            """Leave only the drawn token possible."""
            picked = self._pick(scores, draws[:, ids.shape[1] - width])
            return torch.full_like(scores, -torch.inf).scatter_(1, picked[:, None], 0.0)

        options = GenerationConfig(
            max_new_tokens=self._how.max_new_tokens, do_sample=False, use_cache=True, pad_token_id=self._pad,
            eos_token_id=sorted(self._stops) or None,
        )  # fmt: skip
        with one_thread() if self._base.device.type == "cpu" else nullcontext():
            out = self._base.model.generate(
                input_ids=ids_BP, attention_mask=mask_BP, generation_config=options,
                stopping_criteria=StoppingCriteriaList([asked_each]),
                logits_processor=LogitsProcessorList([] if draws is None else [drawn]),
            )  # fmt: skip
        for i, row in zip(rows, out[:, width:].tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in self._stops), len(row))
            self._answers[i] = row[:end]


def has_mixers_below(base: Base) -> bool:
    """Return True if layers carry a state from token to token. The model's layers may be fused or its own."""
    kinds = getattr(base.model.config.get_text_config(), "layer_types", None) or ()
    return bool(mixers(base.model)) or any("attention" not in kind or kind == "linear_attention" for kind in kinds)


def _room(base: Base) -> float:
    """Return the bytes that dequantised weights may take: half of the free memory."""
    on_cuda = base.device.type == "cuda"
    return PLAIN_SHARE * (torch.cuda.mem_get_info(base.device)[0] if on_cuda else host_share_gib() * GIB)


class _PlainWeights:
    """Hold weights of the library's layers dequantised, as many as fit: each step would dequantise them again."""

    def __init__(self, base: Base, num_bytes: float) -> None:
        self._base, self._kept = base, False
        for module in base.model.modules():
            if isinstance(module, FrozenLinear) and module.is_packed:
                num_bytes -= base.dtype.itemsize * module.in_features * module.out_features
                if num_bytes < 0:
                    return
                try:
                    module.keep_plain(base.dtype)
                except torch.OutOfMemoryError:  # the process has a limit of its own
                    return
                self._kept = True

    def __bool__(self) -> bool:
        return self._kept

    def drop(self) -> None:
        """Drop them, which leaves the layers as they were."""
        self.drop_all(self._base)
        self._kept = False

    @staticmethod
    def drop_all(base: Base) -> None:
        """Drop every dequantised weight, also of a construction that was interrupted."""
        for module in base.model.modules():
            if isinstance(module, FrozenLinear):
                module.keep_plain(None)
