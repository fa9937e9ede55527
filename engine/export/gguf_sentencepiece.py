"""A SentencePiece tokenizer (Llama 2, Mistral 7B) as GGUF holds it: pieces with scores, from tokenizer.json.

llama.cpp joins the two neighbours whose union has the highest score; tokenizer.json joins by the first rule that fits. Both give
the same pieces where every union of two pieces has a rule, and the rules stand in the order of their unions: so Hugging Face
writes them when it converts a tokenizer.model. That is checked here, and the place in the order becomes the score.
tokenizer.model itself, which fine-tuned models often lack, is not needed. gguf's LlamaHfVocab (0.19) scores every piece alike:
the leftmost neighbours are then joined first, whatever they are. Where the rules of today's transformers put a space in front
(Metaspace), they put none before a space; llama.cpp does, as SentencePiece itself.
"""

from __future__ import annotations

import re
from typing import Any

import gguf

from engine.errors import InputError

SPACE = "\u2581"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
UNSCORED = -1000.0  # added tokens are found before any joining; single characters are nobody's union
OTHERWISE = "no GGUF export for this tokenizer; use --to merged and llama.cpp's convert_hf_to_gguf.py"
PREPEND, REPLACE = {"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def is_sentencepiece(values: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is one that was converted from SentencePiece's BPE."""
    model = values.get("model") or {}
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def adds_space(values: dict[str, Any]) -> bool:
    """Whether a text gets a space in front; InputError where spaces are treated in a way that llama.cpp does not know."""
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
    """Piece -> score, higher is joined first; InputError where no scores would join as the rules do."""
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
            raise InputError("tokenizer.json: merges", joined, f"has rules in two places, which no score can say: {OTHERWISE}")
        order.setdefault(joined, len(order))
    for piece in pieces:
        for cut in range(1, len(piece)):
            if piece[:cut] in pieces and piece[cut:] in pieces and (piece[:cut], piece[cut:]) not in ranks:
                raise InputError("tokenizer.json: merges", piece, f"is joined by llama.cpp where no rule joins it: {OTHERWISE}")
    return {piece: -float(place) for piece, place in order.items()}


def kind(token: str, entry: dict[str, Any] | None, unknown: str | None) -> gguf.TokenType:
    """entry: the token's line of added_tokens, if it has one; unknown: the model's unk_token."""
    if token == (unknown or "<unk>"):
        return gguf.TokenType.UNKNOWN
    if entry is not None:
        return gguf.TokenType.CONTROL if entry.get("special") else gguf.TokenType.USER_DEFINED
    return gguf.TokenType.BYTE if BYTE.fullmatch(token) else gguf.TokenType.NORMAL


def _ranks(merges: list[Any]) -> dict[tuple[str, str], int]:
    """Older files write a rule as one text."""
    pairs = [tuple(rule.split(" ", 1)) if isinstance(rule, str) else tuple(rule) for rule in merges]
    return {pair: rank for rank, pair in enumerate(pairs)}
