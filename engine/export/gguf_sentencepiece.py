"""Turn tokenizer.json of a SentencePiece tokenizer (Llama 2, Mistral 7B) into GGUF's scored pieces.

llama.cpp joins the two neighbours whose union has the highest score; tokenizer.json joins by the
first rule that fits. Both give the same pieces under two conditions. Every union of two pieces has
a rule, and the rules are in the order of their unions. Hugging Face writes them so when it converts
a tokenizer.model. This module checks both conditions and makes the place in the order the score.

It does not need tokenizer.model, which fine-tuned models often lack. gguf's LlamaHfVocab (0.19) is
no help: it scores all pieces alike, so llama.cpp would always join the leftmost neighbours first.

With Metaspace, the rules of current transformers put a space in front of a text, but not before a
space. llama.cpp puts one there too, as SentencePiece does.
"""

from __future__ import annotations

import re
from typing import Any

import gguf

from engine.errors import InputError

SPACE = "\u2581"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Score of added tokens, which are found before any joining, and of single characters, which no rule
# makes.
UNSCORED = -1000.0
OTHERWISE = "no GGUF export for this tokenizer; use --to merged and llama.cpp's convert_hf_to_gguf.py"
PREPEND, REPLACE = {"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def is_sentencepiece(values: dict[str, Any]) -> bool:
    """Return True if a tokenizer.json was converted from SentencePiece's BPE."""
    model = values.get("model") or {}
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def adds_space(values: dict[str, Any]) -> bool:
    """Return True if the tokenizer puts a space in front of a text.

    InputError if it treats spaces in a way that llama.cpp does not know.
    """
    normalizer, pre = values.get("normalizer"), values.get("pre_tokenizer")
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    if steps == [PREPEND, REPLACE] and pre is None:
        return True
    if steps == [REPLACE] and pre is None:
        return False
    if not steps and pre and pre.get("type") == "Metaspace" and pre.get("replacement") == SPACE and not pre.get("split", True):
        return pre.get("prepend_scheme") != "never"
    raise InputError("tokenizer.json: normalizer, pre_tokenizer", [normalizer, pre], OTHERWISE)


def scores(values: dict[str, Any]) -> dict[str, float]:
    """Return piece -> score; llama.cpp joins the highest first.

    InputError if no scores give the same pieces as the rules.
    """
    vocab, ranks = values["model"]["vocab"], _ranks(values["model"].get("merges") or [])
    special = {entry["content"] for entry in values.get("added_tokens") or ()}
    pieces = {piece for piece in vocab if piece not in special and not BYTE.fullmatch(piece)}
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in vocab]
    if missing:
        raise InputError("tokenizer.json: vocab", missing[0], f"is missing, so llama.cpp could not write every text: {OTHERWISE}")
    order: dict[str, int] = {}
    for left, right in ranks:
        joined = left + right
        if joined in order and order[joined] != len(order) - 1:
            raise InputError("tokenizer.json: merges", joined, f"has rules in two places, so no score fits: {OTHERWISE}")
        order.setdefault(joined, len(order))
    for piece in pieces:
        for cut in range(1, len(piece)):
            if piece[:cut] in pieces and piece[cut:] in pieces and (piece[:cut], piece[cut:]) not in ranks:
                raise InputError("tokenizer.json: merges", piece, f"is joined by llama.cpp where no rule joins it: {OTHERWISE}")
    return {piece: -float(place) for piece, place in order.items()}


def kind(token: str, entry: dict[str, Any] | None, unknown: str | None) -> gguf.TokenType:
    """Return the GGUF type of a token.

    entry: the token's entry in added_tokens, if any. unknown: the model's unk_token.
    """
    if token == (unknown or "<unk>"):
        return gguf.TokenType.UNKNOWN
    if entry is not None:
        return gguf.TokenType.CONTROL if entry.get("special") else gguf.TokenType.USER_DEFINED
    return gguf.TokenType.BYTE if BYTE.fullmatch(token) else gguf.TokenType.NORMAL


def _ranks(merges: list[Any]) -> dict[tuple[str, str], int]:
    """Return rule -> place in the order. Older files write a rule as one text."""
    pairs = [tuple(rule.split(" ", 1)) if isinstance(rule, str) else tuple(rule) for rule in merges]
    return {pair: rank for rank, pair in enumerate(pairs)}
