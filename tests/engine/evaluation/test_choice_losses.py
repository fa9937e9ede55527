"""Choices are written as the data's answers are: with their white space, their end and their tokens."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from engine.evaluation.choice_losses import samples_of_choices
from engine.evaluation.task_samples import TaskSample
from tests.support.tiny_models import byte_tokenizer


def blank_before_texts():
    """Return a tokenizer that puts a blank before a text and drops it in decoding, as SentencePiece's does."""
    words = ["<unk>", "</s>", "\n", "▁Paris", "Paris", "▁Rome", "Rome", "▁", "a"]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0 if len(word) > 2 else -5.0) for word in words], 0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def written(tokenizer, answer, choices):
    ids = np.array(answer)
    reference = tokenizer.decode(answer, skip_special_tokens=True)
    found = samples_of_choices(tokenizer, TaskSample(np.array([5, 6]), ids, "?", reference, {}), choices)
    assert all(list(one.is_target) == [False] * 2 + [True] * (len(one.input_ids) - 2) for one in found)
    return [one.input_ids[2:].tolist() for one in found]


@pytest.mark.parametrize("answer", [["▁Paris", "</s>"], ["Paris", "</s>"], ["▁Paris"], ["Paris"]])
def test_the_right_choice_has_the_tokens_that_the_answer_has_in_the_data(answer):
    tokenizer = blank_before_texts()
    ids = tokenizer.convert_tokens_to_ids(answer)
    other = tokenizer.convert_tokens_to_ids([answer[0].replace("Paris", "Rome"), *answer[1:]])
    assert written(tokenizer, ids, ["Paris", "Rome"]) == [ids, other]


def test_a_choice_that_begins_another_ends_where_the_other_goes_on():
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    one, ten = written(tokenizer, [*tokenizer(" 10")["input_ids"], end], ["1", "10"])
    assert one[:-1] == ten[: len(one) - 1] and one[-1] == ten[-1] == end
    without = written(tokenizer, tokenizer(" 10")["input_ids"], ["1", "10"])  # answers without an end
    assert without == [one[:-1], ten[:-1]]
