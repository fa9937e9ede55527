"""Rows of preference data are read in all forms that TRL takes, and refused where nothing can be preferred."""

import pytest

from engine.data.formats import RowFormat
from engine.dialogue.conversation import Conversation, Document
from engine.errors import InputError

USER, GOOD, BAD = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}


def read(row, **columns):
    return RowFormat("preference", columns, True).read("row 1", row)


def dialogue(*messages):
    return Conversation(messages, (*(False for _ in messages[1:]), True))


@pytest.mark.parametrize("row", [
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},  # UltraFeedback
    {"prompt": "q", "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [USER], "chosen": "a", "rejected": "b"},
    {"prompt": "[{\"role\": \"user\", \"content\": \"q\"}]", "chosen": "a", "rejected": "b"},  # JSON in a table
])  # fmt: skip
def test_dialogues_become_a_pair_of_dialogues(row):
    pair = read(row)
    assert pair.chosen == dialogue(USER, GOOD) and pair.rejected == dialogue(USER, BAD)


def test_earlier_turns_carry_no_loss():
    other = {"role": "assistant", "content": "earlier"}
    pair = read({"chosen": [SYSTEM, USER, other, USER, GOOD], "rejected": [SYSTEM, USER, other, USER, BAD]})
    assert pair.chosen.learned == (False, False, False, False, True)


def test_text_is_a_pair_of_documents():
    assert read({"prompt": "q: ", "chosen": "yes", "rejected": "no"}).rejected == Document("q: ", "no")
    found = read({"chosen": "Human: q\n\nAssistant: yes, it is", "rejected": "Human: q\n\nAssistant: yes, no"})
    assert found.chosen == Document("Human: q\n\nAssistant: yes,", " it is") and found.rejected.completion == " no"


def test_columns_may_have_other_names():
    pair = read({"question": "q", "good": "a", "bad": "b"}, prompt="question", chosen="good", rejected="bad")
    assert pair.chosen == Document("q", "a")


@pytest.mark.parametrize(("row", "words"), [
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are equal"),
    ({"prompt": "q", "chosen": "a", "rejected": [BAD]}, "both be text or both lists"),
    ({"prompt": "q", "chosen": "a", "rejected": " "}, "rejected: completion is empty"),
    ({"chosen": [GOOD], "rejected": [BAD]}, "begin with the same prompt"),
    ({"prompt": "q", "chosen": 1, "rejected": 2}, "must be text or lists of messages"),
])  # fmt: skip
def test_rows_that_are_no_pair_are_refused(row, words):
    with pytest.raises(InputError, match=words):
        read(row)
