"""Write the tokenizer of a model folder into a GGUF file.

It is a byte-level BPE whose pre-tokenizer llama.cpp knows by name, or a SentencePiece tokenizer
(gguf_sentencepiece.py).

llama.cpp reads from the file only the name of a pre-tokenizer, and a wrong name tokenises
differently without an error. This module therefore recognises a pre-tokenizer by its rules in
tokenizer.json and refuses any other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf

from engine.config.parsing import load_json
from engine.config.trial import ModelConfig
from engine.errors import InputError
from engine.export import gguf_sentencepiece as sentencepiece
from engine.export.gguf_sentencepiece import OTHERWISE
from engine.model.inspect import load_tokenizer

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{ENDINGS}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{ENDINGS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # of gpt-oss
SPLITS = {LLAMA3_SPLIT: "llama-bpe", QWEN2_SPLIT: "qwen2", TEKKEN_SPLIT: "tekken", O200K_SPLIT: "gpt-4o"}


def pre_tokenizer(values: dict[str, Any]) -> str:
    """Return llama.cpp's name for a tokenizer.json's pre-tokenizer; InputError if it has none."""
    model = values.get("model") or {}
    if model.get("type") != "BPE":
        raise InputError("tokenizer.json", model.get("type"), f"must be BPE: {OTHERWISE}")
    pre = values.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", [pre])
    kinds = [part.get("type") for part in parts]
    if kinds[-1:] == ["ByteLevel"] and not parts[-1].get("add_prefix_space"):
        whole = parts[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and whole:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and whole:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not whole and (parts[0].get("pattern") or {}).get("Regex") in SPLITS:
            return SPLITS[parts[0]["pattern"]["Regex"]]
    raise InputError("tokenizer.json: pre_tokenizer", kinds, OTHERWISE)


def add_vocab(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Write tokens, merges or scores, special tokens and chat template of the model folder.

    vocab_size: rows of the embedding.
    """
    values = load_json(folder / "tokenizer.json")
    pieces = sentencepiece.is_sentencepiece(values)
    special = gguf.SpecialVocab(folder, load_merges=not pieces, n_vocab=vocab_size)
    tokens, kinds = _tokens(values, vocab_size, pieces)
    if pieces:
        known = sentencepiece.scores(values)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(sentencepiece.adds_space(values))
        writer.add_token_list(tokens)
        writer.add_token_scores([known.get(token, sentencepiece.UNSCORED) for token in tokens])
        # Without this, llama.cpp puts a beginning token before every text of a SentencePiece model.
        special.add_special_token.update(_ends(folder))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(values))
        writer.add_token_list(tokens)
        special.add_special_token.setdefault("bos", False)
    writer.add_token_types(kinds)
    special.add_to_gguf(writer, quiet=True)


def _ends(folder: Path) -> dict[str, bool]:
    """Return whether the tokenizer puts its beginning and its end token around a text.

    It tokenises a text to find out, because tokenizer files state this in several ways.
    """
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    ids = tokenizer("a")["input_ids"]
    return {"bos": ids[:1] == [tokenizer.bos_token_id], "eos": ids[-1:] == [tokenizer.eos_token_id]}


def _tokens(values: dict[str, Any], vocab_size: int, pieces: bool) -> tuple[list[str], list[int]]:
    """Return tokens and types in the order of ids.

    Embedding rows beyond the tokenizer's (padding to a round number) get names and the type UNUSED.
    """
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * vocab_size
    ids = values["model"]["vocab"].items()
    added = {entry["content"]: entry for entry in values.get("added_tokens") or ()}
    for token, index in [*ids, *((content, entry["id"]) for content, entry in added.items())]:
        if index >= vocab_size:
            raise InputError("tokenizer.json", token, f"id {index} is beyond the model's vocabulary of {vocab_size}")
        entry = added.get(token)
        tokens[index] = token
        if pieces:
            kinds[index] = sentencepiece.kind(token, entry, values["model"].get("unk_token"))
        elif entry is None:
            kinds[index] = gguf.TokenType.NORMAL
        else:
            kinds[index] = gguf.TokenType.CONTROL if entry.get("special") else gguf.TokenType.USER_DEFINED
    return tokens, [int(kind) for kind in kinds]
