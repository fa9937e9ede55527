"""What a model has to write is learnt, up to the token that ends it; what a template drops is refused."""

import json

import pytest

from engine.dialogue.continuation import NO_THOUGHT
from engine.dialogue.conversation import SampleError
from engine.dialogue.spans import MARKED, NO_END, UNASKED
from tests.support.chat_templates import TEMPLATES
from tests.support.dialogues import TOOLS, assistant, call, encode, encoder_for, learnt, user

SYSTEM = {"role": "system", "content": "be brief"}
RESULT = {"role": "tool", "content": "21 degrees"}
OFF = {"template_kwargs": {"enable_thinking": False}}


@pytest.mark.parametrize(
    ("name", "end"),
    [("chatml", "<|im_end|>"), ("phi-3", "<|end|>"), ("gemma-2", "<end_of_turn>"), ("apertus", "<|assistant_end|>"),
     ("harmony", "<|return|>"), ("command-r7b", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"), ("llama-2", " </s>"),
     ("no-end", "</s>"),
     ("glm-4", "<|endoftext|>"), ("tagged", "<|im_end|>"), ("olmo", "<|endoftext|>")],
)  # fmt: skip
def test_targets_end_with_the_token_that_ends_generation(name, end):
    """So does the last answer, behind which Apertus and GLM write nothing; no header follows."""
    for row in learnt(name, user("ask"), assistant("one"), user("more"), assistant("two")):
        for text, word in zip(row, ("one", "two") if len(row) == 2 else [next(w for w in ("one", "two") if w in row[0])]):
            assert text.endswith(f"{word}{end}")


def test_an_end_that_only_generation_config_names_is_learnt(tmp_path, monkeypatch):
    """GLM's answers end where the next header begins."""
    from engine.dialogue import encoding
    from engine.dialogue.conversation import Conversation
    from tests.support.chat_templates import tokenizer_for

    tokenizer = tokenizer_for("glm-4")
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    tokenizer.name_or_path = str(tmp_path)
    messages = (user("ask"), assistant("one"), user("more"), assistant("two"))
    encoder = encoding.Encoder(tokenizer, encoding.DataConfig(train="x"))
    (row,) = encoder.encode([encoder.render(Conversation(messages, (False, True, False, True)))])[0]
    texts = tokenizer.decode([i for i, wanted in zip(row.input_ids, row.is_target) if wanted])
    assert texts == "\n<think></think>\none<|user|>\n<think></think>\ntwo<|user|>" and not row.notes


def test_a_model_of_the_hub_has_its_generation_config_looked_up(tmp_path, monkeypatch):
    import transformers.utils

    from engine.dialogue.encoding import REVISION, end_texts
    from tests.support.chat_templates import tokenizer_for

    tokenizer = tokenizer_for("glm-4")
    tokenizer.name_or_path = "org/model"
    assert end_texts(tokenizer) == ["<|endoftext|>"]  # offline, and not in the cache
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": tokenizer.convert_tokens_to_ids("<|user|>")}))
    asked = []
    monkeypatch.setattr(transformers.utils, "cached_file", lambda name, *_, revision, **__: asked.append(revision) or str(file))
    assert end_texts(tokenizer) == ["<|endoftext|>", "<|user|>"]
    setattr(tokenizer, REVISION, "v1.1")
    assert end_texts(tokenizer) == ["<|endoftext|>", "<|user|>"] and asked == ["main", "v1.1"]


def test_an_end_token_that_no_template_writes_is_added_and_noted():
    _, rows = encode("no-end", user("ask"), assistant("one"), user("more"), assistant("two"))
    assert len(rows) == 2 and all(NO_END in row.notes for row in rows)


def test_the_context_of_an_answer_is_tokenised_as_inference_does():
    """`\\n` before and `\\n` in the answer are one token as soon as they stand side by side."""
    tokenizer, (row,) = encode("chatml", user("ask"), assistant("\nhi"))
    newline = tokenizer.convert_tokens_to_ids("Ċ")
    start = row.is_target.index(True)
    assert row.input_ids[start - 1 : start + 1] == [newline, newline]
    _, rows = encode("chatml", user("ask"), assistant("\nhi"), user("more"), assistant("ho"))
    assert len(rows) == 2 and tokenizer.convert_tokens_to_ids("ĊĊ") in rows[1].input_ids  # as the second prompt has it


def test_a_plain_answer_closes_a_thought_that_its_own_template_closes():
    assert learnt("qwen-3.5", user("ask"), assistant("one")) == [["\n</think>\n\none<|im_end|>"]]
    assert learnt("qwen-3", user("ask"), assistant("one")) == [["<think>\n\n</think>\n\none<|im_end|>"]]
    assert learnt("qwen-3", user("ask"), assistant("one"), **OFF) == [["one<|im_end|>"]]
    assert learnt("gemma-4", user("ask"), assistant("one")) == [["one<turn|>"]]


@pytest.mark.parametrize("name", ["r1-distill", "qwq", "minimax-m2"])
def test_an_opened_thought_is_written_closed_on_request_or_refused_with_both_texts(name):
    end = TEMPLATES[name][1]
    thought = {"reasoning_content": "let me see"}
    assert learnt(name, user("ask"), assistant("one", **thought)) == [[f"let me see\n</think>\n\none{end}"]]
    assert learnt(name, user("ask"), assistant("<think>\nlet me see\n</think>\n\none")) == [[f"let me see\n</think>\n\none{end}"]]
    with pytest.raises(SampleError, match=r"message 2 \(assistant\).*<think>.*one.*enable_thinking=false.*reasoning_content"):
        learnt(name, user("ask"), assistant("one"))
    _, (row,) = encode(name, user("ask"), assistant("one"), **OFF)
    assert learnt(name, user("ask"), assistant("one"), **OFF) == [[f"\n</think>\n\none{end}"]] and row.notes == (NO_THOUGHT,)


def test_thoughts_of_earlier_turns_are_learnt_where_they_are_written():
    turns = user("ask"), assistant("one", reasoning_content="first"), user("more"), assistant("two", reasoning_content="second")
    expected = [["<think>\nfirst\n</think>\n\none<|im_end|>"], ["<think>\nsecond\n</think>\n\ntwo<|im_end|>"]]
    assert learnt("qwen-3", *turns) == expected
    assert learnt("harmony", *turns)[0] == [
        "<|channel|>analysis<|message|>first<|end|><|start|>assistant<|channel|>final<|message|>one<|return|>"
    ]
    assert learnt("qwen-3", *turns, turns="last") == expected[1:]


def test_one_row_holds_all_turns_where_only_the_end_differs():
    for name in ("chatml", "phi-3", "apertus", "olmo", "command-r7b", "tagged"):
        assert len(encode(name, *[user("ask"), assistant("one")] * 5)[1]) == 1, name
    (row,) = learnt("chatml", *[user("ask"), assistant("one")] * 5, turns="last")
    assert len(row) == 1


def test_only_learned_messages_are_learnt():
    turns = user("ask"), assistant("one"), user("more"), assistant("two"), user("bye")
    for learned, expected in (((1,), "one"), ((3,), "two")):
        (row,) = learnt("chatml", *turns, learned=tuple(i in learned for i in range(5)))
        assert row == [f"{expected}<|im_end|>"]


def test_generation_tags_decide_what_is_learnt():
    assert learnt("tagged", user("ask"), assistant("one"), user("more"), assistant("two")) == [["one<|im_end|>", "two<|im_end|>"]]
    assert learnt("tagged-wide", user("ask"), assistant("one")) == [["<think>\n\n</think>\none<|im_end|>"]]
    assert learnt("tagged", user("ask"), assistant("one"), user("more"), assistant("two"), turns="last") == [["two<|im_end|>"]]


def test_blocks_of_generation_that_are_empty_or_touch_are_one_answer():
    """Phi's training template tags the end of a text too; Gemma's has a block for content that may be empty."""
    turns = user("ask"), assistant("", tool_calls=call()), RESULT, assistant("\ntwo")
    ((first, last),) = learnt("tagged-parts", *turns, tools=TOOLS)
    assert first.startswith('{"name": "look_up"') and first.endswith("}<|im_end|>")
    assert last == "\ntwo<|im_end|>"


def test_a_thought_that_only_the_generation_prompt_has_is_not_learnt():
    turns = user("ask"), assistant("one"), user("more"), assistant("two")
    assert learnt("closed-by-header", *turns) == [["one<|eos|>"], ["two<|eos|>"]]
    end = "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
    assert learnt("closed-before-header", *turns) == [[f"<|START_RESPONSE|>one{end}"], [f"<|START_RESPONSE|>two{end}"]]


def test_a_header_that_the_generation_prompt_lacks_is_not_learnt():
    """Some templates ask for no further answer behind an answer."""
    turns = user("ask"), assistant("one"), assistant("two")
    assert learnt("asks-after-questions", *turns) == [["one<|im_end|>", "two<|im_end|>"]]


@pytest.mark.parametrize(
    ("name", "messages", "tools", "expected"),
    [("chatml", [user("ask"), assistant("", tool_calls=call())], None, r"message 2 \(assistant\).*function\.name"),
     ("llama-3", [user("ask"), assistant("let me look", tool_calls=call())], TOOLS, r"message 2 \(assistant\).*content"),
     ("mistral", [user("ask"), assistant("one"), RESULT, assistant("two")], None, r"message 3 \(tool\).*content"),
     ("first-system-only", [user("ask"), assistant("one"), SYSTEM, user("more"), assistant("two")], None, r"3 \(system\)"),
     ("chatml", [user("ask"), assistant("", reasoning_content="hm")], None, r"message 2 \(assistant\).*reasoning_content"),
     ("chatml", [user("ask"), assistant("one")], TOOLS, "tools: .*look_up"),
     ("glm-4", [user("ask"), assistant("one", tool_calls=call())], None, r"message 2 \(assistant\).*function\.name"),
     ("qwen-3", [user("ask"), assistant("close with </think> please")], None, r"message 2 \(assistant\).*content"),
     ("gemma-2", [SYSTEM, user("ask"), assistant("one")], None, "message 3 .assistant.: the chat template refused it: roles"),
     ("chatml", [assistant("hello")], None, "no answer behind a question")],
)  # fmt: skip
def test_what_a_template_leaves_out_is_refused_by_name(name, messages, tools, expected):
    with pytest.raises(SampleError, match=expected) as caught:
        learnt(name, *messages, tools=tools)
    assert "\n" not in str(caught.value) and "\ufdd0" not in str(caught.value)


def test_a_word_that_stands_there_by_chance_is_no_proof():
    """`a` stands in `assistant`, but the template dropped the message."""
    with pytest.raises(SampleError, match=r"message 3 \(system\)"):
        learnt(
            "first-system-only", user("ask"), assistant("one"), {"role": "system", "content": "a"}, user("more"), assistant("two")
        )


def test_calls_are_passed_in_the_form_that_the_template_takes():
    turns = user("ask"), assistant("", tool_calls=call()), RESULT, assistant("warm")
    assert learnt("calls-as-json", *turns) == [['look_up {"city": "Paris", "days": 3}<|im_end|>', "warm<|im_end|>"]]
    (first, _), *_ = learnt("qwen-2.5", *turns, tools=TOOLS)
    assert first == '<tool_call>\n{"name": "look_up", "arguments": {"city": "Paris", "days": 3}}\n</tool_call><|im_end|>'


def test_content_is_passed_as_parts_where_the_template_wants_them():
    assert learnt("content-parts", user("ask"), assistant("one")) == [[" one<end_of_utterance>"]]


@pytest.mark.parametrize("name", ["chatml", "llama-3", "qwen-3", "gemma-2", "mistral", "harmony", "tagged"])
def test_a_special_token_in_a_message_is_text(name):
    tokenizer, _ = encoder_for(name)
    end = tokenizer.eos_token
    _, (row,) = encode(name, user(f"what is {end}?"), assistant(f"{end} ends"))
    _, (plain,) = encode(name, user("what is that?"), assistant("that ends"))
    specials = set(tokenizer.all_special_ids)
    assert [i for i in row.input_ids if i in specials] == [i for i in plain.input_ids if i in specials]
    assert f"{end} ends" in tokenizer.decode([i for i, wanted in zip(row.input_ids, row.is_target) if wanted])
    assert row.notes == (MARKED,) and not plain.notes


def test_an_answer_before_the_first_question_is_context_only():
    _, (row,) = encode("chatml", assistant("welcome"), user("ask"), assistant("one"))
    assert row.notes == (UNASKED,)
    assert learnt("chatml", assistant("welcome"), user("ask"), assistant("one")) == [["one<|im_end|>"]]
    tokenizer, (row,) = encode("gemma-2", assistant("welcome"), user("ask"), assistant("one"))  # the template cannot write it
    assert "welcome" not in tokenizer.decode(row.input_ids) and row.notes == (UNASKED,)
    assert learnt("chatml", SYSTEM, assistant("hello"), user("ask"), assistant("one")) == [["hello<|im_end|>", "one<|im_end|>"]]


def test_the_day_is_the_one_in_the_config():
    for name, expected in (("llama-3", "Today: 07 Mar 2025"), ("harmony", "Current date: 2025-03-07")):
        tokenizer, (row,) = encode(name, user("ask"), assistant("one"), date="2025-03-07")
        assert expected in tokenizer.decode(row.input_ids)
        identities = [encoder_for(name, date=day)[1].identity for day in ("2025-03-07", "2025-03-08")]
        assert identities[0] != identities[1]
    assert encoder_for("chatml", date="2025-03-07")[1].identity == encoder_for("chatml", date="2025-03-08")[1].identity
