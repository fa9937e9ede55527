"""A refusal names ways out that work, and a thought that is dropped is said, not refused."""

import re

import pytest

from engine.dialogue.conversation import SampleError
from engine.dialogue.encoding import ONE_EACH
from engine.dialogue.spans import THOUGHT_LEFT_OUT
from tests.support.dialogues import TOOLS, assistant, call, encode, learnt, user

SYSTEM = {"role": "system", "content": "be brief"}
RESULT = {"role": "tool", "content": "21 degrees"}
THOUGHT = {"reasoning_content": "let me see"}


def refusal(name, *messages, **options):
    with pytest.raises(SampleError) as caught:
        encode(name, *messages, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "messages", "tools", "named"),
    [("r1-distill", [user("ask"), assistant("one")], None, ["enable_thinking=false", "each answer its thought", "chatml"]),
     ("first-system-only", [user("ask"), assistant("one"), SYSTEM, user("more"), assistant("two")], None,
      ["take it out", "chatml"]),
     ("mistral", [user("ask"), assistant("one"), RESULT, assistant("two")], None, ["take it out", "chatml"]),
     ("chatml", [user("ask"), assistant("one")], TOOLS, ["take them out"]),
     ("chatml", [user("ask"), assistant("let me look", tool_calls=call())], None,
      ["take it out", "take calls and their results out"]),
     ("chatml", [user("ask"), assistant("", tool_calls=call()), RESULT, assistant("two")], None,
      ["take it out", "take calls and their results out"]),
     ("gemma-2", [SYSTEM, user("ask"), assistant("one")], None, ["chatml"]),
     ("chatml", [assistant("hello")], None, ["bad_rows=skip"]),
     ("chatml", [user("ask"), assistant("", **THOUGHT)], None, ["bad_rows=skip"])],
)  # fmt: skip
def test_only_ways_out_that_work_are_named(name, messages, tools, named):
    line = refusal(name, *messages, tools=tools)
    _, _, ways = line.rpartition("; ")
    assert "\n" not in line and len(ways.split(", or ")) == len(named)
    assert all(word in way for word, way in zip(named, ways.split(", or ")))
    if "enable_thinking=false" in ways:
        assert encode(name, *messages, template_kwargs={"enable_thinking": False})[1]
    if "chatml" in ways:
        assert encode(name, *messages, tools=tools, chat_template="chatml")[1]
    if "thought" in ways:
        assert encode(name, *[{**m, **THOUGHT} if m["role"] == "assistant" else m for m in messages])[1]
    if "them out" in ways:
        assert encode(name, *messages)[1]
    if found := re.match(r"message (\d+) \((?:system|tool)\).*take it out", line):
        assert encode(name, *(m for i, m in enumerate(messages) if i != int(found[1]) - 1))[1]


def test_a_way_out_that_does_not_work_is_not_named():
    """ChatML has no calls either; without thinking, this template drops the answer's text all the same."""
    line = refusal("llama-3", user("ask"), assistant("let me look", tool_calls=call()), tools=TOOLS)
    assert "take it out" in line and "chatml" not in line and "template_kwargs" not in line
    line = refusal("qwen-3", user("ask"), assistant("close with </think> please"))
    assert line.endswith("; set data.chat_template=chatml")


def test_each_kind_of_refusal_is_tried_once(monkeypatch):
    from engine.dialogue import spans

    tried, given = [], spans.Spans.tried
    monkeypatch.setattr(spans.Spans, "tried", lambda self, sample: tried.append(sample) or given(self, sample))
    for word in ("one", "two", "three"):
        refusal("zephyr", user("ask"), assistant(word, tool_calls=call()))
    first = next(i for i, sample in enumerate(tried) if sample.messages[1]["content"] == "two")
    assert first > 1 and len(tried) == first + 2


def test_thoughts_that_a_template_drops_are_a_line():
    turns = user("ask"), assistant("one", **THOUGHT), user("more"), assistant("two")
    for name, end in (("chatml", "<|im_end|>"), ("llama-3", "<|eot_id|>"), ("gemma-4", "<turn|>")):
        _, rows = encode(name, *turns)
        assert [text for row in learnt(name, *turns) for text in row] == [f"one{end}", f"two{end}"]
        assert {note for row in rows for note in row.notes} - {ONE_EACH} == {THOUGHT_LEFT_OUT}
    assert not encode("chatml", user("ask"), assistant("one"))[1][0].notes
    _, rows = encode("qwen-3", *turns)
    assert THOUGHT_LEFT_OUT not in {note for row in rows for note in row.notes}
    learned = (False, False, False, True)
    assert not encode("chatml", *turns, learned=learned)[1][0].notes  # by design: this answer is not learnt


def test_a_thought_that_stands_there_by_chance_is_no_proof_that_it_was_written():
    _, (row,) = encode("chatml", user("ask"), assistant("a one", reasoning_content="a"))
    assert row.notes == (THOUGHT_LEFT_OUT,)


def test_a_thought_in_the_content_stays_there_where_a_template_knows_no_tags():
    text = "<think>\nlet me see\n</think>\n\none"
    assert learnt("chatml", user("ask"), assistant(text)) == [[f"{text}<|im_end|>"]]
    response = f"<|START_RESPONSE|>{text}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
    assert learnt("command-r7b", user("ask"), assistant(text)) == [[response]]


def test_an_empty_thought_is_none():
    expected = [["<|channel|>final<|message|>one<|return|>"]]
    for text in ("<think></think>one", "<think>\n\n</think>\n\none"):
        assert learnt("harmony", user("ask"), assistant(text)) == expected
        assert learnt("r1-distill", user("ask"), assistant(text)) == [["\n</think>\n\none<|eos|>"]]


def test_an_answer_behind_an_answer_is_what_follows_the_generation_prompt():
    """Apertus and Gemma 4 go on with the earlier answer, but ask for a new one."""
    turns = user("ask"), assistant("one"), assistant("two")
    for name, end in (("apertus", "<|assistant_end|>"), ("continues", "<turn|>")):
        tokenizer, rows = encode(name, *turns)
        assert [text for row in learnt(name, *turns) for text in row] == [f"one{end}", f"two{end}"]
        prompt = tokenizer.apply_chat_template([*turns[:2]], add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(rows[-1].input_ids).startswith(f"{prompt}two{end}")


def test_an_answer_in_a_context_that_the_template_rewrites_is_known():
    """Mistral puts the system message before the last question, and drops it behind an answer."""
    (row,) = learnt("system-before-last", SYSTEM, user("ask"), assistant("one"))
    assert row == ["one</s>"]
    tokenizer, (row,) = encode("system-before-last", SYSTEM, user("ask"), assistant("one"))
    assert tokenizer.decode(row.input_ids) == "<s>[INST] be brief ask[/INST]one</s>"


def test_tagged_answers_get_the_end_token_that_their_template_lacks():
    _, rows = encode("tagged-no-end", user("ask"), assistant("one"), user("more"), assistant("two"))
    assert learnt("tagged-no-end", user("ask"), assistant("one")) == [["one</s>"]] and len(rows) == 2


def test_several_samples_of_one_dialogue_are_said():
    turns = user("ask"), assistant("one", **THOUGHT), user("more"), assistant("two", **THOUGHT)
    assert all(row.notes == (ONE_EACH,) for row in encode("qwen-3", *turns)[1])
    assert not encode("qwen-3", *turns, turns="last")[1][0].notes


def test_what_is_left_out_is_named_before_a_prompt_that_differs():
    """The call is lost and the prompt opens a thought: another switch would only lead to the next refusal."""
    line = refusal("r1-distill", user("ask"), assistant("", tool_calls=call()), RESULT, assistant("two", **THOUGHT))
    assert "does not write its tool_calls[0].function.name; " in line and line.endswith("take calls and their results out")
