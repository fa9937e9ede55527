"""For any order of messages, each answer is learnt once, in its own prompt, or one line says why not.

transformers is the witness: it writes the prompts, and it must share every refusal that no word of
a message explains.
"""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from engine.dialogue.conversation import SampleError
from engine.dialogue.spans import THOUGHT_LEFT_OUT, UNASKED
from tests.support.dialogues import TOOLS, encode, encoder_for, spans

NAMES = (
    "chatml", "llama-3", "mistral", "qwen-2.5", "qwen-3", "qwen-3.5", "r1-distill", "gemma-2", "glm-4", "apertus", "harmony",
    "phi-3", "tagged", "continues", "system-before-last", "asks-after-questions", "first-system-only", "closed-by-header",
    "no-end", "reminder-last", "no-header", "ends-before-next", "system-before-last-tools",
    "gemma-4-thoughts", "system-when-asked", "spaces-differ", "opens-after-a-line",
)  # fmt: skip
HEALTH = list(HealthCheck)
SETTINGS = settings(
    max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=HEALTH, phases=[Phase.generate]
)
TAGS = ("<think>", "</think>", "<think></think>", "<channel|>")
OPENED, CLOSED = "<|channel>thought", "<channel|>"  # of one family of templates


@st.composite
def dialogues(draw):
    """Messages in any order; the word of message i is w<i>x, that of its thought t<i>x, of its call c<i>x."""
    messages, learned = [], []
    for i, role in enumerate(draw(st.lists(st.sampled_from(["user", "assistant", "system", "call"]), min_size=1, max_size=5))):
        content = draw(st.sampled_from(["", "\n", " "])) + f"w{i}x" + draw(st.sampled_from(["", "\n\n", "é."]))
        message = {"role": "assistant" if role == "call" else role, "content": content}
        thought = draw(st.sampled_from([None, None, "apart", "inline"])) if message["role"] == "assistant" else None
        if thought == "apart":
            message["reasoning_content"] = f"t{i}x"
        elif thought == "inline":
            message["content"] = f"<think>\nt{i}x\n</think>\n\nw{i}x"
        if role == "call":
            call = {"name": "look_up", "arguments": {"city": f"c{i}x"}}
            message = {**message, "content": "", "tool_calls": [{"type": "function", "function": call}]}
        messages.append(message)
        learned.append(message["role"] == "assistant" and draw(st.integers(0, 4)) > 0)
        if role == "call":
            messages.append({"role": "tool", "content": f"r{i}x"})
            learned.append(False)
    return messages, learned, TOOLS if any("tool_calls" in m for m in messages) else None


def ask(tokenizer, messages, tools):
    """Return the prompts that transformers writes for messages, thoughts beside the content or in it."""
    found = []
    for inline in (False, True):
        given = [dict(m) for m in messages]
        for m in given:
            text = m["content"].split("\n</think>\n\n")
            if not inline and len(text) == 2:
                m.update(content=text[1], reasoning_content=text[0].removeprefix("<think>\n"))
            if "reasoning_content" in m:
                m["thinking"] = m["reasoning_content"]
        try:
            text = tokenizer.apply_chat_template(given, tools=tools and [*tools], add_generation_prompt=True, tokenize=False)
        except Exception:
            continue
        found.append((tokenizer(text, add_special_tokens=False)["input_ids"], text))
    return found


def words(message):
    """Return the words of a message that no template may drop in silence."""
    if called := message.get("tool_calls"):
        return [called[0]["function"]["arguments"]["city"], "look_up"]
    return [message["content"].split("</think>\n\n")[-1].strip()]


@pytest.mark.parametrize("name", NAMES)
def test_each_answer_is_learnt_once_in_its_own_prompt_or_refused_for_a_reason(name):
    tokenizer, _ = encoder_for(name)

    @SETTINGS
    @given(dialogues())
    def check(dialogue):
        messages, learned, tools = dialogue
        question = next((i for i, m in enumerate(messages) if m["role"] not in ("assistant", "system")), len(messages))
        asked = [i for i, wanted in enumerate(learned) if wanted]
        starts = [messages, [m for i, m in enumerate(messages) if i >= question or m["role"] != "assistant"]]
        shift = len(messages) - len(starts[1])
        prompts = {i: ask(tokenizer, messages[:i], tools) + ask(tokenizer, starts[1][: i - shift], tools) for i in asked if i}
        try:
            _, rows = encode(name, *messages, learned=tuple(learned), tools=tools)
        except SampleError as error:
            line = str(error)
            assert "; " in line and "\n" not in line
            texts = [(i, text) for i, found in prompts.items() for _, text in found]
            lost = [word for i, text in texts for m in messages[:i] for word in words(m) if word not in text]
            is_called = any("does not write its tool_calls" in line and "tool_calls" in messages[i] for i in asked)
            opens = any(tag in text[-20:] for _, text in texts for tag in TAGS)
            is_refused = any(not prompts[i] or not ask(tokenizer, messages[: i + 1], tools) for i in prompts)
            assert not asked or lost or opens or is_called or is_refused or set(asked) <= set(range(question)) or tools, line
            return
        notes = {note for row in rows for note in row.notes}
        left, found = [i for i in asked if i >= question or UNASKED not in notes], []
        for row in rows:
            for before, answer in spans(row):
                text = tokenizer.decode(answer)
                inside = [i for i in asked if words(messages[i])[0] in text]
                assert not (tokenizer.decode(before).rstrip().endswith(CLOSED) and text.lstrip().startswith(OPENED))
                assert inside and all(words(messages[i])[0] not in text for i in range(len(messages)) if not learned[i])
                first = inside[0]
                ids = [found for found, _ in prompts[first]]
                behind = first and messages[first - 1]["role"] == "assistant"  # some prompts ask for no answer behind an answer
                assert before in ids or (behind and any(before[: len(found)] == found for found in ids))
                for i in inside:
                    thought = f"t{i}x" if "tool_calls" not in messages[i] and f"t{i}x" in str(messages[i]) else ""
                    assert thought in text or THOUGHT_LEFT_OUT in notes
                    found.append(i)
        whole = " ".join(tokenizer.decode(row.input_ids) for row in rows)
        after = [m for m in messages[: asked[-1] + 1] if m in messages[question:] or m["role"] == "system"]
        assert set(left) <= set(found) and len(set(found)) == len(found)
        assert all(word in whole for m in after for word in words(m))

    check()
