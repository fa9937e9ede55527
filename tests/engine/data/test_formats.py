"""Rows of every form become one kind of conversation or document, or one line says why not."""

import json

import pytest

from engine.data.formats import RowFormat
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
    ({"prompt": "p", "completion": "c", "label": 0}, Document("p", "c")),
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
    ({"messages": [USER, ANSWER], "kto_tag": False}, "kto_tag is false"),
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


def test_the_first_row_decides_the_format_of_all():
    rows = RowFormat("auto", {}, True)
    rows.read("row 1", {"text": "t"})
    with pytest.raises(InputError, match=r"row 2 = .*column 'text' is missing"):
        rows.read("row 2", {"prompt": "p", "completion": "c"})
