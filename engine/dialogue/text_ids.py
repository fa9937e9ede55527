"""Tokenise many texts in one call, and each stretch of text between two added tokens only once.

A tokenizer first cuts a text at its added tokens, and then takes each stretch on its own. Where a
template repeats earlier turns in the context of later ones, most stretches are equal. Added tokens
that take spaces along, and tokenizers with a call of their own, get whole texts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


class TextIds:
    """Return the ids of texts, as `tokenizer(texts, add_special_tokens=False)` does."""

    def __init__(self, tokenizer: Any, context_free: bool) -> None:
        """context_free: the tokenizer puts nothing before a text, wherever it stands."""
        self._tokenizer, self._backend = tokenizer, tokenizer.backend_tokenizer
        added = tokenizer.added_tokens_decoder
        takes_spaces = any(t.lstrip or t.rstrip or t.single_word for t in added.values())
        self._apart = {} if takes_spaces or not context_free else {str(t): [i] for i, t in added.items() if not t.normalized}
        longest_first = sorted(filter(None, self._apart), key=len, reverse=True)
        self._tokens = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._is_plain = _is_plain(tokenizer)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._apart:
            return self._whole(texts)
        cut = [self._tokens.split(text) for text in texts]
        stretches = list(dict.fromkeys(part for parts in cut for part in parts[::2] if part))
        known = {**dict(zip(stretches, self._whole(stretches))), **self._apart, "": []}
        return [known[parts[0]] if len(parts) == 1 else [i for part in parts for i in known[part]] for parts in cut]

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        if not self._is_plain:
            return self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        return [found.ids for found in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _is_plain(tokenizer: Any) -> bool:
    """Return whether the tokenizer's call is the library's, which adds nothing to the backend's ids."""
    from transformers import PreTrainedTokenizerFast

    kind, names = type(tokenizer), ("__call__", "_encode_plus")
    is_own = any(getattr(kind, name, None) is not getattr(PreTrainedTokenizerFast, name, None) for name in names)
    return not is_own and not getattr(tokenizer, "split_special_tokens", False)
