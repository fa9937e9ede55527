"""Generate answers to a few evaluation samples, with and without the adapter.

Decoding is greedy, so the answers are reproducible. It uses the model that has just been evaluated,
with its original decoder layers: the fused ones take packed rows and keep no key-value cache. The
answers are for people to read and do not affect the sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.data.packing import Sample
from engine.data.view import AnyView, JoinedView
from engine.layers.swap import restore_layers
from engine.model.base import Base, end_tokens
from engine.model.comparison import own_attentions
from engine.model.device import host_share_gib, one_thread
from engine.model.pretrained import text_attention
from engine.quant.frozen_linear import FrozenLinear
from engine.units import GIB

MAX_NEW_TOKENS = 48
ROOM = 0.7  # share of the free memory for dequantised weights
MAX_TEXT_PROMPT = 64  # tokens; plain text has no prompt, so its beginning serves as one


@dataclass(frozen=True)
class Question:
    """Hold one question to the model.

    prompt: token ids [P] up to the first answer. expected: token ids of that answer in the data, at
    most MAX_NEW_TOKENS.
    """

    prompt: np.ndarray
    expected: np.ndarray


def choose_questions(view: AnyView, count: int) -> list[Question]:
    """Return questions from the first `count` samples with different prompts, or all there are.

    Of several evaluation sets, the one with most weight asks.
    """
    if isinstance(view, JoinedView) and view.weights:
        view = view.parts[max(view.weights, key=lambda name: view.weights[name])]
    found: dict[bytes, Question] = {}
    for i in range(len(view)):
        if len(found) >= count:
            break
        question = _question(view[i])
        found.setdefault(question.prompt.tobytes(), question)
    return list(found.values())


def _question(sample: Sample) -> Question:
    targets = np.flatnonzero(sample.is_target)
    start = int(targets[0]) if targets[0] > 1 else max(1, min(len(sample.input_ids) // 2, MAX_TEXT_PROMPT))
    rest = sample.is_target[start : start + MAX_NEW_TOKENS]
    # The answer ends at the first non-target token: later targets belong to another turn.
    length = len(rest) if rest.all() else int(np.argmin(rest))
    return Question(sample.input_ids[:start], sample.input_ids[start : start + length])


def write_examples(base: Base, questions: list[Question], take_off_adapter: Callable[[], None]) -> list[dict[str, str]]:
    """Return a dict of prompt, expected, base and adapter, all text, for each question.

    The adapter must be attached; `take_off_adapter` detaches it. The model cannot train afterwards:
    its layers no longer take packed rows, and as many weights as fit are dequantised.
    """
    restore_layers(base.model)
    _unpack_weights(base)
    base.model.set_attn_implementation(text_attention(base.model.config, own_attentions(base.model)[0]))
    base.model.eval()
    with one_thread():
        with_adapter = _answers(base, questions)
        take_off_adapter()
        without = _answers(base, questions)
    decode = base.tokenizer.decode
    return [
        {
            "prompt": decode(question.prompt.tolist(), skip_special_tokens=True),
            "expected": decode(question.expected.tolist(), skip_special_tokens=True),
            "base": before,
            "adapter": after,
        }
        for question, before, after in zip(questions, without, with_adapter, strict=True)
    ]


def _unpack_weights(base: Base) -> None:
    """Dequantise as many weights as fit into ROOM of the free memory.

    A step of a few tokens would otherwise spend most of its time on dequantising.
    """
    on_cuda = base.device.type == "cuda"
    free = torch.cuda.mem_get_info(base.device)[0] if on_cuda else host_share_gib() * GIB
    room = ROOM * free
    for module in base.model.modules():
        if isinstance(module, FrozenLinear) and module.is_packed:
            room -= base.dtype.itemsize * module.in_features * module.out_features
            if room < 0:
                return
            module.unpack(base.dtype)


@torch.no_grad()
def _answers(base: Base, questions: list[Question]) -> list[str]:
    """Return the answers to all questions, generated as one batch with padding on the left."""
    ends = end_tokens(base)
    pad = ends[0] if ends else 0
    width = max(len(question.prompt) for question in questions)
    ids_BT = torch.full((len(questions), width), pad, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, question in enumerate(questions):
        ids_BT[row, width - len(question.prompt) :] = torch.from_numpy(question.prompt.astype(np.int64))
        mask_BT[row, width - len(question.prompt) :] = 1
    options: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "use_cache": True, "pad_token_id": pad}
    if ends:
        options["eos_token_id"] = ends
    out_BT = base.model.generate(input_ids=ids_BT.to(base.device), attention_mask=mask_BT.to(base.device), **options)
    return [base.tokenizer.decode(row[width:], skip_special_tokens=True) for row in out_BT.cpu()]
