"""For random dialogues and every template, what is learnt is what the model has to write.

transformers is the witness: each learnt answer must follow the ids of its own generation prompt, as
apply_chat_template and the tokenizer make them.
"""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.dialogue.conversation import SampleError
from tests.support.chat_templates import TEMPLATES
from tests.support.dialogues import assistant, encode, encoder_for, spans, user

ENDS = {
    "gemma-2": ["<end_of_turn>"], "phi-3": ["<|end|>"], "llama-2": ["</s>"], "tagged-parts": ["<|im_end|>"],
}  # fmt: skip
THOUGHTS = ("r1-distill", "qwq", "minimax-m2", "qwen-3", "qwen-3.5", "glm-4", "harmony")
CLOSES = (
    "gemma-4",
    "closed-before-header",
    "closed-by-header",
    "continues",
    "system-before-last",
    "no-header",
    "reminder-last",
    "gemma-4-thoughts",
    "system-when-asked",
    "spaces-differ",
)
MUST_THINK = ("r1-distill", "qwq", "minimax-m2", "opens-after-a-line")
WORDS = st.text(st.sampled_from("ahit \n:.#1é"), min_size=1, max_size=8).filter(str.strip)
TEXT = st.builds(str.__add__, st.sampled_from(["", "\n", " ", "\n\n"]), WORDS)


@st.composite
def dialogues(draw, name):
    messages = draw(st.lists(TEXT.map(lambda text: {"role": "system", "content": text}), max_size=1))
    for _ in range(draw(st.integers(1, 3))):
        thought = draw(st.none() | st.just("i think")) if name in THOUGHTS else None
        messages += [user(draw(TEXT)), assistant(draw(TEXT), **({"reasoning_content": thought} if thought else {}))]
    return messages


def prompt_of(tokenizer, messages):
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "content-parts"])
def test_each_answer_follows_the_prompt_that_asks_for_it_and_ends_generation(name):
    tokenizer, _ = encoder_for(name)
    ends = [*ENDS.get(name, []), tokenizer.eos_token]
    refused = []

    @settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(dialogues(name))
    def check(messages):
        try:
            _, rows = encode(name, *messages)
        except SampleError as error:
            assert re.match(r"message \d+ \((system|user|assistant)\): \S", str(error))
            refused.append(str(error))
            return
        found = [pair for row in rows for pair in spans(row)]
        asked = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        assert len(found) == len(asked)
        for before, answer in found:
            number = next((i for i in asked if prompt_of(tokenizer, messages[:i])[1] == before), None)
            assert number is not None, "an answer stands in a context that no prompt has"
            asked.remove(number)
            text, content = tokenizer.decode(answer), messages[number]["content"].strip()
            end = next(end for end in ends if text.endswith(end))
            assert content in text and not any(other in text.removesuffix(end) for other in ends)
            assert (thought := messages[number].get("reasoning_content", "")) in text
            rendered = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
            prompt = prompt_of(tokenizer, messages[:number])[0]
            if rendered.startswith(prompt):
                written = (rendered + end).removeprefix(prompt) if end not in rendered[len(prompt) :] else rendered[len(prompt) :]
                assert written.startswith(text) or text.removesuffix(end).rstrip() == written.removesuffix(end).rstrip()
            else:
                assert thought or name in CLOSES
        assert not asked

    check()
    if name in MUST_THINK:
        assert all("enable_thinking" in line for line in refused)
    elif name == "gemma-2":
        assert all("roles must alternate" in line for line in refused)
    else:
        assert not refused
