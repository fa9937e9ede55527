"""Turn conversations and documents into token ids with one tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.config.trial import DataConfig
from engine.data.conversation import Conversation, Document, Encoded
from engine.data.templates import Renderer, TargetText, chat_template
from engine.errors import InputError


class Encoder:
    """Render samples and tokenise what was rendered."""

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        template = chat_template(tokenizer, config.chat_template)
        if not tokenizer.is_fast:
            raise InputError("model.path", type(tokenizer).__name__, "must have a fast tokenizer (tokenizer.json), to locate targets")
        self._tokenizer, self.template = tokenizer, template
        self.has_template = template is not None
        self.identity = [template, tokenizer.backend_tokenizer.to_str(), tokenizer.bos_token, tokenizer.eos_token]
        self._renderer = Renderer(tokenizer, template)

    def render(self, sample: Conversation | Document) -> list[TargetText]:
        """Return the texts of one sample. SampleError if the template refuses it."""
        return self._renderer.render(sample)

    def encode(self, rendered: list[list[TargetText]]) -> list[list[Encoded]]:
        """Return the ids of each sample's texts."""
        texts = [text for row in rendered for text in row]
        if not texts:
            return []
        found = self._tokenizer([t.text for t in texts], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        encoded = iter(zip(texts, found["input_ids"], found["offset_mapping"]))
        return [[Encoded(ids, _targets(offsets, text.spans)) for text, ids, offsets in (next(encoded) for _ in row)] for row in rendered]


def _targets(offsets: list[tuple[int, int]], spans: tuple[tuple[int, int], ...]) -> list[bool]:
    start, end = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    hit = np.zeros(len(offsets), dtype=bool)
    for low, high in spans:
        hit |= (end > low) & (start < high) & (end > start)
    return hit.tolist()
