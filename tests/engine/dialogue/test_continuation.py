"""An answer is learnt behind the prompt that asks for it, also where a dialogue is written otherwise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.dialogue.continuation import answer_between, behind_more, behind_same_words
from engine.dialogue.conversation import SampleError
from tests.support.dialogues import TOOLS, assistant, call, encode, learnt, user

SYSTEM = {"role": "system", "content": "be brief"}
RESULT = {"role": "tool", "content": "21 degrees"}
ROUND = user("ask"), assistant("", tool_calls=call()), RESULT, assistant("warm"), user("more"), assistant("two")
CALLED = '[{"type": "function", "function": {"name": "look_up", "arguments": {"city": "Paris", "days": 3}}}]'


def contexts(name, *messages, tools=None):
    """Return what stands before each answer, and what transformers asks with."""
    tokenizer, rows = encode(name, *messages, tools=tools)
    found = [tokenizer.decode(row.input_ids[: row.is_target.index(True)]) for row in rows]
    asked = [
        tokenizer.apply_chat_template(list(messages[:i]), tools=tools, add_generation_prompt=True, tokenize=False)
        for i, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    return found, asked


def test_a_reminder_behind_the_last_message_is_context_and_never_learnt():
    """It stands behind a call too, whose text has no end token: none of it may be learnt."""
    expected = [[f"Action: {CALLED}<|END|>"], ["warm<|END|>"], ["two<|END|>"]]
    assert learnt("reminder-last", *ROUND) == expected
    found, asked = contexts("reminder-last", *ROUND)
    assert found == asked and all("Write 'Action:' first" in text for text in asked)


def test_an_answer_without_a_header_is_what_follows_the_messages_before_it():
    assert learnt("no-header", user("ask"), assistant("one"), user("more"), assistant("two")) == [["one</s>"], ["two</s>"]]
    found, asked = contexts("no-header", user("ask"), assistant("one"), user("more"), assistant("two"))
    assert found == asked == ["ask\nAnswer: ", "ask\none\nmore\nAnswer: "]


def test_an_answer_behind_an_answer_is_found_behind_the_earlier_ones_end_token():
    turns = user("ask"), assistant("one"), assistant("two"), assistant("three")
    assert learnt("ends-before-next", *turns) == [["one<|eos|>", "two<|eos|>", "three<|eos|>"]]
    tokenizer, (row,) = encode("ends-before-next", *turns)
    header = "<|assistant|><think></think>"
    assert tokenizer.decode(row.input_ids) == f"<s><|user|>ask{header}one<|eos|>{header}two<|eos|>{header}three<|eos|>"


def test_an_answer_is_known_where_tools_change_the_last_question():
    rows = learnt("system-before-last-tools", *ROUND, tools=TOOLS)
    assert rows == [[f"[CALLS]{CALLED}</s>"], ["warm</s>", "two</s>"]]
    found, asked = contexts("system-before-last-tools", *ROUND, tools=list(TOOLS))
    assert found == asked[:2] and "Call in one array. ask" in asked[0] and "Call in one array." not in asked[1]
    tokenizer, rows = encode("system-before-last-tools", *ROUND, tools=TOOLS)
    assert tokenizer.decode(rows[1].input_ids) == f"{asked[2]}two</s>"


@pytest.mark.parametrize(
    ("before", "prompt", "header", "whole", "answer"),
    [("q", "q<a>", "q<a>", "q<a>one", None),  # no reminder: the plain rules hold
     ("qR", "qR<a>", "q<a>", "q<a>oneR", "one"), ("qR", "qR<a>", "q<a>", "q<a>one", None),
     ("qR", "qR<a>", "q<b>", "q<b>oneR", None),
     ("q", "qA:", "q", "qone", "one"), ("q", "q\n", "q", "qone", None), ("q", "q<think>\n", "q", "qone", None),
     ("q", "q", "q", "qone", None), ("q", "qA:", "q", "zone", None)],
)  # fmt: skip
def test_only_a_known_difference_is_taken(before, prompt, header, whole, answer):
    assert answer_between(before, prompt, header, whole) == answer


def test_a_text_that_only_the_prompt_has_is_context():
    """The header of an answer may go on behind the prompt: the model writes that part."""
    turns = user("ask"), assistant("one"), user("more"), assistant("two")
    for messages in (turns, (SYSTEM, *turns)):
        assert learnt("system-when-asked", *messages) == [[" to=user<|message|>one<|eot|>", " to=user<|message|>two<|eot|>"]]
        found, asked = contexts("system-when-asked", *messages)
        assert found == asked[:1] and ("Be helpful." in asked[0]) == (messages is turns)
    (row,) = learnt("system-when-asked", *ROUND)
    assert row == [f" to=tool<|message|>{CALLED}<|eot|>", " to=user<|message|>warm<|eot|>", " to=user<|message|>two<|eot|>"]


def test_white_space_that_only_the_prompt_has_is_context():
    first, *others = learnt("spaces-differ", *ROUND)
    assert first == [f"<function_call> {CALLED}<|endoftext|>"] and others == [["warm<|endoftext|>", "two<|endoftext|>"]]
    found, asked = contexts("spaces-differ", *ROUND)
    assert found[0] == asked[0] == "USER: ask\nASSISTANT: \n" and asked[1].endswith("TOOL: 21 degrees\nASSISTANT: \n")


def test_a_thought_is_found_behind_a_prompt_that_opens_it_with_other_white_space():
    thinking = assistant("one", reasoning_content="let me see")
    assert learnt("opens-after-a-line", user("ask"), thinking) == [["let me see\n</think>\n\none<turn|>"]]
    with pytest.raises(SampleError, match="give each answer its thought"):
        learnt("opens-after-a-line", user("ask"), assistant("one"))


@pytest.mark.parametrize(
    ("before", "prompt", "whole", "answer"),
    [("<s>ask", "<s>Sask<a>", "<s>ask<a>one", "one"), ("<s>ask", "<s>Sask<a>", "<s>ask<a to=b>one", None),
     ("<s>ask", "<s>Sask<a", "<s>ask<a to=b>one", " to=b>one"), ("<s>ask", "<s>Sask", "<s>askone", None),
     ("<s>ask", "<s>Sasked<a>", "<s>ask<a>one", None), ("<s>ask", "<s>ask<a>", "<s>ask<a>one", None),
     ("<s>ask", "<s>Sask<think>", "<s>ask<think>one", None), ("<s>ask", "<s>Sask<a>", "<s>asks<a>one", None)],
)  # fmt: skip
def test_more_before_the_last_message_is_known_by_what_stands_behind_it(before, prompt, whole, answer):
    assert behind_more(before, prompt, whole) == answer


@given(st.text("ab \n", max_size=8), st.text("ab \n", max_size=8), st.text("ab \n", max_size=4))
def test_prompts_that_differ_in_white_space_have_the_same_words_before_the_answer(prompt, spaced, answer):
    whole, squashed = spaced + answer, "".join
    found = behind_same_words(prompt, whole)
    words = squashed(prompt.split())
    assert (found is None) == (not words or not squashed(whole.split()).startswith(words))
    if found is not None:
        assert whole.endswith(found) and words + squashed(found.split()) == squashed(whole.split())
        assert not (prompt[-1].isspace() and found[:1].isspace())


def test_no_thought_is_learnt_behind_one_that_the_prompt_has_closed():
    """The prompt says that the model is not to think: an answer with a thought needs the other prompt."""
    thinking = user("ask"), assistant("one", reasoning_content="let me see")
    with pytest.raises(SampleError, match="; set data.template_kwargs.enable_thinking=true, or set data.chat_template=chatml$"):
        learnt("gemma-4-thoughts", *thinking)
    for turns, text in (
        (thinking, "<|channel>thought\nlet me see\n<channel|>one<turn|>"),
        ((user("ask"), assistant("one")), "one<turn|>"),
    ):
        assert learnt("gemma-4-thoughts", *turns, template_kwargs={"enable_thinking": True}) == [[text]]
    assert learnt("gemma-4-thoughts", user("ask"), assistant("one")) == [["one<turn|>"]]


def test_a_token_in_an_answer_that_the_template_acts_on_is_refused():
    """Side by side both halves look like the answer, but the token between them is the template's own."""
    with pytest.raises(
        SampleError, match=r"^message 2 \(assistant\): the chat template acts on a special token in its content; "
    ):
        learnt("cuts-at-think", user("ask"), assistant("close with </think> please"))
    for turns in ((user("what is </think>?"), assistant("one")), (user("ask"), assistant("no <|user|> here"))):
        (row,) = encode("cuts-at-think", *turns)[1]
        assert row.is_target.count(True)


@pytest.mark.parametrize("start", [(), (assistant("welcome"),), (assistant("welcome"), assistant("hello"))])
def test_messages_have_the_numbers_that_they_have_in_the_row(start):
    """Gemma 2 cannot write an answer before the first question, so it is dropped; its call is lost anyway."""
    turns = *start, user("ask"), assistant("one"), user("more"), assistant("", tool_calls=call())
    with pytest.raises(SampleError, match=rf"^message {len(turns)} \(assistant\): .*tool_calls.*; take") as caught:
        learnt("gemma-2", *turns)
    assert "take it out" in str(caught.value) and learnt("gemma-2", *turns[:-1])
