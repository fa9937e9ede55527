"""What the model answers to a few evaluation samples, before and after: greedy, so that the answers repeat themselves.

Runs on the model that has just been evaluated: its decoder's own layers are put back, since training's fused ones take packed
rows and keep no cache of keys and values. For people to read; nothing is judged by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.data.packing import Sample
from engine.data.views import View
from engine.layers.swap import restore_layers
from engine.model.base import Base, end_tokens
from engine.model.device import host_share_gib
from engine.quant.frozen_linear import FrozenLinear
from engine.units import GIB

MAX_NEW_TOKENS = 48
ROOM = 0.7
MAX_TEXT_PROMPT = 64  # tokens that plain text, which has no prompt of its own, begins with


@dataclass(frozen=True)
class Question:
    """prompt: token ids [P] up to the first answer. expected: those of that answer in the data, as many as may be generated."""

    prompt: np.ndarray
    expected: np.ndarray


def choose_questions(view: View, count: int) -> list[Question]:
    """Of the first samples of the evaluation set, `count` with different prompts; fewer where there are no more."""
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
    length = len(rest) if rest.all() else int(np.argmin(rest))  # a later turn of the conversation is another answer
    return Question(sample.input_ids[:start], sample.input_ids[start : start + length])


def write_examples(base: Base, questions: list[Question], take_off_adapter: Callable[[], None]) -> list[dict[str, str]]:
    """prompt, expected, base and adapter of each question, as text. The adapter is on the model, and `take_off_adapter` takes it
    off. The model is spent: its layers take no packed rows any more, and its weights are dequantised where there is room."""
    restore_layers(base.model)
    _unpack_weights(base)
    base.model.set_attn_implementation("sdpa")
    base.model.eval()
    with _one_thread():
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


@contextmanager
def _one_thread() -> Iterator[None]:
    """Steps of a few tokens are too small to share: on two cores that others used too, four took 65 s, and 1.2 s on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _unpack_weights(base: Base) -> None:
    """As many as fit into ROOM of the free memory: a step of a few tokens spends more on dequantising than on the rest."""
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
    """All at once, as one batch padded on the left."""
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
