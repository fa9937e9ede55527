"""Ids of many texts, cut at the added tokens, are those of the tokenizer's own call."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers

from engine.dialogue.text_ids import TextIds
from tests.support.chat_templates import tokenizer_for

BITS = ("hi", "a", "\n", " ", "  ", ":", "th", "é", "e\u0301", "<|im_end|>", "<|im_start|>", "<s>", "he", "hi a", "12", "\u2581")
TEXTS = st.lists(st.lists(st.sampled_from(BITS), max_size=12).map("".join), max_size=4)
SPACED = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])


def made(normalizer=None, pre_tokenizer=None, tokens=()):
    tokenizer = tokenizer_for("granite")
    tokenizer.add_tokens([AddedToken("<|im_end|>", normalized=False), AddedToken("<|im_start|>", normalized=False), *tokens])
    if normalizer:
        tokenizer.backend_tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


def plainly(tokenizer, texts):
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


KINDS = {
    "words": (made(), True),
    "NFC": (made(normalizers.NFC()), True),
    "stripped": (made(normalizers.Strip()), True),
    "tokens in normalized text": (made(normalizers.NFC(), tokens=[AddedToken(t, normalized=True) for t in ("hi", "a<")]), True),
    "tokens that overlap": (made(tokens=[AddedToken(token, normalized=False) for token in ("hi a", "a<|im")]), True),
    "tokens that take spaces": (made(tokens=[AddedToken("he", lstrip=True, normalized=False)]), True),
    "a space before a text": (made(None, pre_tokenizers.ByteLevel(add_prefix_space=True)), False),
    "a mark before a text": (made(SPACED), False),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_tokenizer_s_own_call(kind):
    tokenizer, context_free = KINDS[kind]
    ids_of = TextIds(tokenizer, context_free)

    @given(TEXTS)
    @settings(max_examples=60, deadline=None)
    def check(texts):
        assert ids_of(texts) == plainly(tokenizer, texts)

    check()


def test_a_tokenizer_that_puts_a_space_before_a_text_may_not_be_cut():
    tokenizer = made()
    first = pre_tokenizers.Metaspace(prepend_scheme="first")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, as_bytes])
    texts = ["a<|im_end|>hi"]
    assert TextIds(tokenizer, False)(texts) == plainly(tokenizer, texts) != TextIds(tokenizer, True)(texts)


def test_equal_stretches_are_tokenised_once(monkeypatch):
    tokenizer, _ = KINDS["words"]
    ids_of, asked = TextIds(tokenizer, True), []
    monkeypatch.setattr(ids_of, "_whole", lambda texts: asked.extend(texts) or plainly(tokenizer, list(texts)))
    texts = ["hi<|im_end|>a", "hi<|im_end|>a<|im_end|>th"]
    assert ids_of(texts) == plainly(tokenizer, texts) and asked == ["hi", "a", "th"]


def test_a_tokenizer_with_a_call_of_its_own_is_called(monkeypatch):
    tokenizer = made()

    class Own(type(tokenizer)):
        def __call__(self, texts, **options):
            return {"input_ids": [[7] for _ in texts]}

    tokenizer.__class__ = Own
    assert TextIds(tokenizer, False)(["hi", "a"]) == [[7], [7]]


def test_a_length_or_padding_that_the_tokenizer_brings_changes_nothing():
    tokenizer = made()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=20)
    assert TextIds(tokenizer, True)(["a" * 5])[0] == [tokenizer.convert_tokens_to_ids("a")] * 5
