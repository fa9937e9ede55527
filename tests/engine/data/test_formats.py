"""Rows of every form become one kind of conversation or document, or one line says why not."""

import json

import pytest

from engine.config.data_section import DataConfig
from engine.config.parsing import parse
from engine.data.formats import REPEATED, UNRENDERED, RowFormat
from engine.dialogue.conversation import Conversation, Document
from engine.dialogue.templates import REASONING
from engine.errors import InputError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def read(row, wanted="auto", has_template=True, **columns):
    return RowFormat(wanted, columns, has_template).read("data.train line 7", row)


def said(row, **options):
    with pytest.raises(InputError) as caught:
        read(row, **options)
    assert str(caught.value).startswith("data.train line 7 = ") and "\n" not in str(caught.value)
    return caught.value.allowed


def chat(*messages, learned=None, tools=None):
    return Conversation(messages, learned or tuple(m["role"] == "assistant" for m in messages), tools)


def call(**arguments):
    function = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [function]}


PARTS = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}, "c"]
SYSTEM = {"role": "system", "content": "s"}
SAME = [
    ({"messages": [USER, ANSWER]}, chat(USER, ANSWER)),
    ({"messages": json.dumps([USER, ANSWER])}, chat(USER, ANSWER)),
    ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, chat(USER, ANSWER)),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, chat(USER, ANSWER)),
    ({"messages": [{"role": "User", "content": "q"}, {"role": "model", "content": "a"}]}, chat(USER, ANSWER)),
    ({"messages": [USER, {**ANSWER, "content": PARTS}]}, chat(USER, {**ANSWER, "content": "a bc"})),
    ({"messages": [USER, {**ANSWER, "name": None}]}, chat(USER, ANSWER)),
    ({"conversations": [USER, ANSWER], "system": "s"}, chat(SYSTEM, USER, ANSWER)),
    ({"messages": [SYSTEM, USER, ANSWER], "system": "s"}, chat(SYSTEM, USER, ANSWER)),
    ({"messages": [USER, ANSWER], "system": ""}, chat(USER, ANSWER)),
    ({"messages": [USER, ANSWER], "tools": "[]"}, chat(USER, ANSWER)),
    ({"messages": [USER, ANSWER], "tools": '[{"name": "f"}]'}, chat(USER, ANSWER, tools=({"name": "f"},))),
    ({"messages": [USER, ANSWER], "tools": ['{"name": "f"}']}, chat(USER, ANSWER, tools=({"name": "f"},))),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": null}'}}]}]},
     chat(USER, call(x=None))),
    ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}]},
     chat(USER, call(x=1))),
    ({"messages": [USER, {"role": "assistant", "function_call": {"name": "f", "arguments": ""}}]}, chat(USER, call())),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                        {"from": "observation", "value": "r"}, {"from": "gpt", "value": "a"}]},
     chat(USER, call(), {"role": "tool", "content": "r"}, ANSWER)),
    *(({"messages": [USER, {**ANSWER, key: "t"}]}, chat(USER, {**ANSWER, "reasoning_content": "t"}))
      for key in REASONING),
    *(({"messages": [USER, {**ANSWER, **mark}, USER, ANSWER]}, chat(USER, ANSWER, USER, ANSWER, learned=(False,) * 3 + (True,)))
      for mark in ({"weight": 0}, {"train": False}, {"training": "false"}, {"loss": 0.0}, {"mask": True}, {"masked": 1})),
    ({"messages": [{**USER, "weight": 0}, {**ANSWER, "weight": 1}]}, chat(USER, ANSWER)),
    ({"messages": [USER, ANSWER, USER, ANSWER], "loss_mask": [0, 1, 0, 0]},
     chat(USER, ANSWER, USER, ANSWER, learned=(False, True, False, False))),
    ({"prompt": "p", "completion": "c"}, Document("p", "c")),
    ({"prompt": "p", "completion": "c", "label": True}, Document("p", "c")),
    ({"prompt": "p", "completion": "c", "label": 3}, Document("p", "c")),
    ({"prompt": "p", "completion": "c", "label": 1}, Document("p", "c")),
    ({"messages": [USER, ANSWER], "label": 0}, chat(USER, ANSWER)),
    ({"instruction": "q", "output": "a", "label": 0}, chat(USER, ANSWER)),
    ({"text": "t", "label": 0}, Document("", "t")),
    ({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, chat(USER, ANSWER, USER, ANSWER, learned=(False,) * 3 + (True,))),
    ({"prompt": [USER], "completion": "a"}, chat(USER, ANSWER)),
    ({"prompt": "q", "completion": [ANSWER]}, chat(USER, ANSWER)),
    ({"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}, chat(USER, ANSWER)),
    ({"instruction": "i", "input": "x", "output": "a"}, chat({**USER, "content": "i\n\nx"}, ANSWER)),
    ({"instruction": "q", "input": None, "output": "a", "system": "s", "history": [["q", "a"]]},
     chat(SYSTEM, USER, ANSWER, USER, ANSWER)),
    ({"text": "t", "label": False}, Document("", "t")),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), SAME)
def test_a_row_becomes_what_it_means(row, expected):
    assert read(row) == expected


REFUSED = [
    ({"messages": [USER]}, "no assistant message"),
    ({"messages": []}, "non-empty list"),
    ({"messages": "no json"}, "messages must be JSON"),
    ({"messages": ["q", "a"]}, r"messages\[0\] must be an object"),
    ({"messages": [{"role": "asistant", "content": "a"}]}, "the role 'asistant'; known: .*assistant"),
    ({"messages": [{"content": "a"}]}, "the role None"),
    ({"messages": [USER, {"role": "assistant", "content": 5}]}, r"messages\[1\].content must be text, not int"),
    ({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\] has no content"),
    ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, r"messages\[1\] is an empty answer"),
    ({"messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER]}, "part of type 'image_url'"),
    ({"messages": [{**USER, "content": [{"type": "text", "text": "q", "image": "x"}]}, ANSWER]}, "only text can be learnt"),
    ({"messages": [{**USER, "images": ["x"]}, ANSWER]}, r"messages\[0\].images is not text"),
    ({"messages": [USER, ANSWER], "images": ["x"]}, "images is not text"),
    ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "weight = 0.5 must be 0 or 1"),
    ({"messages": [USER, {**ANSWER, "weight": 0}]}, "no assistant message that is to be learnt"),
    ({"messages": [USER, {**ANSWER, "weight": 1, "train": False}]}, "to be learnt and not to be learnt"),
    ({"messages": [{**USER, "train": True}, ANSWER]}, "asks to learn a user message"),
    ({"messages": [USER, {**ANSWER, "train_detail": [{"begin_offset": 0}]}]}, "parts of a message"),
    ({"messages": [USER, ANSWER], "loss_mask": [0, 1, 1]}, "loss_mask must be a list of 2"),
    ({"messages": [USER, ANSWER], "loss_mask": [1, 1]}, r"loss_mask\[0\] asks to learn a user"),
    ({"messages": [SYSTEM, USER, ANSWER], "system": "other"}, "system text of its own"),
    ({"messages": [USER, ANSWER], "tools": "no json"}, "tools must be JSON"),
    ({"messages": [USER, ANSWER], "tools": 5}, "tools must be a list"),
    ({"messages": [USER, ANSWER], "tools": ["5"]}, r"tools\[0\] must be an object"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x"}]}]}, "arguments must be JSON"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}]}, "must be an object, not list"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"arguments": {}}]}]}, "must name a function"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1e999}}]}]}, "too large for JSON"),
    ({"messages": [USER, {**ANSWER, "thinking": "t", "reasoning": "u"}]}, "different values under thinking and reasoning"),
    ({"messages": [{**USER, "content": "\ud800"}, ANSWER]}, r"messages\[0\].content holds half a surrogate pair"),
    ({"messages": [USER, ANSWER], "tools": [{"name": "\udfff"}]}, r"tools\[0\].name holds half a surrogate"),
    ({"messages": [USER, {**ANSWER, "note": "\ud800"}]}, r"messages\[1\].note holds half"),
    ({"text": "a\0b"}, "text holds a NUL character"),
    ({"prompt": "\ud83d", "completion": "c"}, "prompt holds half a surrogate pair"),
    ({"prompt": "a", "completion": "b\ufdd0c"}, r"completion holds U\+FDD0"),
    ({"messages": [{**USER, "content": "q\ufdd1"}, ANSWER]}, r"messages\[0\].content holds U\+FDD0 or U\+FDD1"),
    ({"prompt": USER["content"], "completion": [USER, ANSWER]}, "completion repeats the prompt"),
    ({"prompt": [USER], "completion": [USER, ANSWER]}, "completion repeats the prompt"),
    ({"text": ""}, "text is empty"),
    ({"text": None}, "text must be a string, not nothing"),
    ({"prompt": "p", "completion": ""}, "completion is empty"),
    ({"prompt": "p", "completion": 5}, "completion must be a string, not int"),
    ({"prompt": "p", "completion": "c", "label": False}, "label is false.*KTO.*data.bad_rows=skip"),
    ({"prompt": "p", "completion": "c", "label": "False"}, "label is false"),
    *(({"prompt": "p", "completion": "c", "label": no}, "label is .*KTO.*rename the column") for no in (0, 0.0, "0", " false ")),
    ({"prompt": [USER], "completion": [ANSWER], "label": 0}, "label is 0.*KTO"),
    *(({"messages": [USER, ANSWER], "kto_tag": no}, "kto_tag is (false|0)") for no in (False, 0, "0", "FALSE")),
    ({"prompt": "p", "completion": "c", "system": "s"}, "system needs messages"),
    ({"instruction": "i", "output": "o", "input": 5}, "input must be a string"),
    ({"instruction": "i", "output": "o", "history": [["q"]]}, r"history\[0\] must be a pair"),
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, r"data.columns=\{completion: chosen\}"),
    ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, r"data.columns=\{messages: chosen\}"),
    ({"question": "q", "answer": "a"}, "columns fit no format.*data.columns"),
    (["text"], "must be an object with named columns"),
]


@pytest.mark.parametrize(("row", "why"), REFUSED)
def test_a_row_that_cannot_be_right_is_one_line(row, why):
    import re

    assert re.search(why, said(row))


def test_deep_nesting_is_refused():
    deep = {}
    for _ in range(90):
        deep = {"x": deep}
    row = {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": deep}]}]}
    assert "levels deep" in said(row)


def test_alpaca_without_a_template_takes_stanford_s_prompt():
    found = read({"instruction": "i", "input": "x", "output": "o"}, has_template=False)
    assert found.completion == "o" and found.prompt.endswith("### Instruction:\ni\n\n### Input:\nx\n\n### Response:\n")
    assert "chat template" in said({"instruction": "i", "output": "o", "system": "s"}, has_template=False)
    assert "chat template" in said({"instruction": "i", "output": "o", "history": [["q", "a"]]}, has_template=False)


def test_columns_of_other_names_are_read_under_ours():
    assert read({"dialog": [USER, ANSWER]}, messages="dialog") == chat(USER, ANSWER)
    assert read({"question": "q", "answer": "a"}, prompt="question", completion="answer") == Document("q", "a")
    assert read({"prompt": "q", "chosen": "a", "rejected": "b"}, completion="chosen") == Document("q", "a")
    assert read({"messages": [USER, ANSWER], "body": "t"}, text="body") == Document("", "t"), "a named column decides the format"
    assert "no column 'dialog'" in said({"messages": [USER, ANSWER]}, messages="dialog")


TEXT, PAIR = {"text": "t"}, {"prompt": "p", "completion": "c"}


def decided(*rows, **columns):
    found = RowFormat("auto", columns, True)
    found.decide([(f"row {i}", row) for i, row in enumerate(rows, 1)])
    return found


@pytest.mark.parametrize("rows", [[TEXT, PAIR, PAIR], [PAIR, PAIR, TEXT], [None, {}, {"prompt": 5}, PAIR], [PAIR, TEXT]])
def test_most_of_the_first_rows_decide_the_format_of_all(rows):
    found = decided(*rows)
    assert found.read("row 9", PAIR) == Document("p", "c")
    with pytest.raises(InputError, match=r"row 1 = .*column 'prompt' is missing, but most .* prompt_completion"):
        found.read("row 1", TEXT)


def test_numbers_under_label_are_classes_where_one_is_no_verdict():
    rows = [{**PAIR, "label": label} for label in (0, 1, 2)]
    assert decided(*rows).read("row 1", rows[0]) == Document("p", "c")
    with pytest.raises(InputError, match="label is 0"):
        decided(*rows[:2]).read("row 1", rows[0])
    with pytest.raises(InputError, match="label is false"):
        decided(*rows).read("row 4", {**PAIR, "label": False})


LONG = "What is the capital of France? "


def test_a_completion_that_repeats_its_prompt_is_learnt_from_behind_it():
    pairs = [{"prompt": text, "chosen": text + "Paris", "rejected": "b"} for text in (LONG, "2 + 2 = ")]
    found = decided(*pairs, completion="chosen")
    learnt = [found.read("row", pair) for pair in pairs]
    assert learnt == [Document(LONG, "Paris"), Document("2 + 2 = ", "Paris")] and all(REPEATED in one.notes for one in learnt)
    other = found.read("row", {"prompt": LONG, "chosen": "Paris"})
    assert other == Document(LONG, "Paris") and other.notes == (UNRENDERED,)


def test_that_plain_prompts_are_not_rendered_is_said_where_there_is_a_template():
    row = {"prompt": "2 + 2 = ", "completion": "4"}
    for has_template, notes in ((True, (UNRENDERED,)), (False, ())):
        assert RowFormat("auto", {}, has_template).read("row", row).notes == notes
    assert RowFormat("auto", {}, True).read("row", {"text": "4"}).notes == ()


@pytest.mark.parametrize(
    "rows",
    [
        [(LONG, LONG + "Paris"), (LONG, "Paris")],  # not all do
        [("appl", "apple"), ("ban", "banana")],  # words begun
        [(LONG, LONG), (LONG + "?", LONG + "?")],  # copies
        [(" ", " a")],
    ],
)
def test_a_completion_that_begins_like_its_prompt_by_chance_stays_whole(rows):
    pairs = [dict(zip(("prompt", "completion"), row)) for row in rows]
    found = decided(*pairs)
    assert [found.read("row", pair) for pair in pairs] == [Document(*row) for row in rows]


@pytest.mark.parametrize(
    ("row", "columns", "why"),
    [
        (PAIR, {"prompt": "completion"}, "'completion' would be read as prompt and as completion"),
        ({**PAIR, "tools": "[]"}, {"system": "prompt"}, "'prompt' would be read as system and as prompt"),
        ({"instruction": "i", "output": "o"}, {"input": "instruction"}, "as input and as instruction"),
        ({"messages": [USER, ANSWER], "system_prompt": "s"}, {"tools": "system_prompt"}, "as tools and as system"),
        ({"messages": [USER, ANSWER], "h": []}, {"history": "h"}, "messages reads no history"),
        ({"body": "t", "s": "s"}, {"text": "body", "system": "s"}, "text reads no system"),
    ],
)
def test_a_column_that_would_be_read_twice_or_not_at_all_is_one_line(row, columns, why):
    with pytest.raises(InputError, match=f"data.columns = .*{why}"):
        decided(row, **columns)


def test_columns_may_change_places_and_may_be_absent_from_some_rows():
    assert decided(PAIR, prompt="completion", completion="prompt").read("row", PAIR) == Document("c", "p")
    assert decided({"conversations": [USER, ANSWER], "system_prompt": "s"}, messages="conversations", system="system_prompt")
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER], "persona": "s"}]
    found = decided(*rows, system="persona", tools="functions")
    assert [found.read("row", row) for row in rows] == [chat(USER, ANSWER), chat(SYSTEM, USER, ANSWER)]
    with pytest.raises(InputError, match="data.columns = .*no row has a column 'functions'"):
        found.refuse_unseen()


def test_one_column_of_theirs_is_one_of_ours():
    with pytest.raises(InputError, match="columns = .*'q' for one of ours alone"):
        parse(DataConfig, {"train": "x", "columns": {"prompt": "q", "completion": "q"}})
