"""Texts get the tokens that inference would see, whatever the tokenizer does at their edges."""

import pytest

from engine.config.data_section import DataConfig
from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.dialogue.conversation import Conversation, Document, Encoded
from engine.dialogue.encoding import Encoder, printed_day
from engine.errors import InputError
from tests.support.chat_templates import tokenizer_for
from tests.support.dialogues import TOOLS, assistant, encode, user


def encoder(tokenizer, **options):
    return Encoder(tokenizer, DataConfig(train="x", **options))


def rows(tokenizer, *samples, **options):
    made = encoder(tokenizer, **options)
    return [row for sample in made.encode([made.render(s) for s in samples]) for row in sample]


def learnt(tokenizer, row):
    return tokenizer.decode([i for i, wanted in zip(row.input_ids, row.is_target) if wanted])


@pytest.fixture
def adds_both():
    """A tokenizer that puts <s> before a text and </s> behind it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_for("zephyr")
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return tokenizer


@pytest.fixture
def metaspace():
    """A tokenizer of SentencePiece's kind, which puts a space before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["▁", "\n", *"abehilrstuASINT:[]/", "▁hi", "hi", "▁a"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "i"), ("▁", "hi"), ("▁", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")
    answer = "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    fast.chat_template = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]" + answer
    return fast


@pytest.mark.parametrize("text", ["hi", "<s>hi", "hi</s>", "<s>hi</s>", "<s>hi</s>\n"])
def test_begin_and_end_tokens_of_a_text_are_there_once(adds_both, text):
    (row,) = rows(adds_both, Document("", text))
    assert adds_both.decode(row.input_ids).rstrip("\n") == "<s>hi</s>"
    assert learnt(adds_both, row) == "hi</s>"


def test_a_prompt_has_no_loss_and_is_tokenised_apart(adds_both):
    (row,) = rows(adds_both, Document("ask:\n", "\nhi"))
    newline = adds_both.convert_tokens_to_ids("Ċ")
    assert learnt(adds_both, row) == "\nhi</s>" and row.input_ids.count(newline) == 1  # `:\\n` is one token, `\\n` another
    assert row.input_ids[0] == adds_both.bos_token_id and row.input_ids[-1] == adds_both.eos_token_id


def test_no_space_is_put_between_a_prompt_and_its_answer(metaspace):
    (row,) = rows(metaspace, Document("ask", "hi"))
    tokens = metaspace.convert_ids_to_tokens([i for i, wanted in zip(row.input_ids, row.is_target) if wanted])
    assert tokens == ["hi", "</s>"]
    (row,) = rows(metaspace, Conversation((user("a"), assistant("hi")), (False, True)))
    tokens = metaspace.convert_ids_to_tokens([i for i, wanted in zip(row.input_ids, row.is_target) if wanted])
    assert tokens == ["▁hi", "</s>"]
    assert row.input_ids == metaspace("[INST] a [/INST] hi</s>", add_special_tokens=False)["input_ids"]


def test_many_samples_at_once_are_encoded_as_alone():
    tokenizer = tokenizer_for("chatml")
    samples = [
        Conversation((user("a"), assistant("\nhi"), user("<|im_end|>"), assistant("x")), (False, True, False, True)),
        Document("a", "b"),
        Conversation((user("a"), assistant("b"), user("a"), assistant("c")), (False, True, False, True)),
    ]
    made = encoder(tokenizer)
    together = made.encode([made.render(s) for s in samples])
    assert together == [made.encode([made.render(s)])[0] for s in samples]
    assert made.encode([]) == [] and all(isinstance(row, Encoded) for sample in together for row in sample)


def test_a_variable_that_no_template_reads_is_refused():
    for kwargs, message in (({"thinknig": False}, "'thinknig'"), ({"messages": "x"}, "comes from the data")):
        with pytest.raises(InputError, match=rf"data\.template_kwargs.*{message}"):
            encoder(tokenizer_for("qwen-3"), template_kwargs=kwargs)
    encoder(tokenizer_for("qwen-3"), template_kwargs={"enable_thinking": True})
    encoder(tokenizer_for("r1-distill"), template_kwargs={"enable_thinking": False})
    with pytest.raises(InputError, match="enable_thinking"):
        encoder(tokenizer_for("chatml"), template_kwargs={"enable_thinking": False})


def test_everything_that_decides_the_ids_is_part_of_the_identity():
    tokenizer = tokenizer_for("qwen-3")
    options = [{}, {"turns": "last"}, {"template_kwargs": {"enable_thinking": False}}, {"chat_template": "chatml"}]
    identities = [encoder(tokenizer, **option).identity for option in options]
    assert all(identities.count(identity) == 1 for identity in identities)


def test_only_a_template_that_prints_the_day_makes_the_day_matter():
    from datetime import date

    assert printed_day(tokenizer_for("llama-3"), DataConfig(train="x")) == str(date.today())
    assert printed_day(tokenizer_for("llama-3"), DataConfig(train="x", date="2025-03-07")) == "2025-03-07"
    assert printed_day(tokenizer_for("chatml"), DataConfig(train="x", date="2025-03-07")) is None


@pytest.mark.parametrize("day", ["yesterday", "2025-3-7", "2025-02-30", "20250307"])
def test_a_day_is_written_one_way(day):
    with pytest.raises(InputError, match=r"date = .*2026-11-26"):
        parse(DataConfig, {"train": "x", "date": day})


def test_new_fields_leave_old_fingerprints_as_they_are():
    config = {"model": {"path": "m"}, "data": {"train": "t"}, "train": {"max_tokens": 100}}
    plain = parse(TrainConfig, config).fingerprint()
    for field, value, default in (
        ("template_kwargs", {"enable_thinking": False}, None), ("date", "2025-03-07", None), ("turns", "last", "all"),
    ):  # fmt: skip
        assert parse(TrainConfig, {**config, "data": {"train": "t", field: default}}).fingerprint() == plain
        assert parse(TrainConfig, {**config, "data": {"train": "t", field: value}}).fingerprint() != plain


@pytest.mark.parametrize("name", ["chatml", "llama-3", "phi-4", "tagged", "vicuna", "granite"])
def test_a_border_that_no_token_can_cross_spares_the_second_encoding_and_changes_nothing(name, monkeypatch):
    """Answers may begin with characters that join the end of a prompt, or with none of them."""
    starts, seen, is_split = ("hi", "\n", " a", "\n\nhi", "1", ":\n", "é"), [], Encoder._is_split
    dialogues = [[user("ask" + a), assistant(a + "one"), user("b" + b), assistant(b + "two")] for a in starts for b in starts]

    def never(*border):
        seen.append(is_split(*border))
        return False

    found = [encode(name, *dialogue)[1] for dialogue in dialogues]
    monkeypatch.setattr(Encoder, "_is_split", never)
    assert [encode(name, *dialogue)[1] for dialogue in dialogues] == found
    assert any(seen) == (name != "vicuna")  # its generation prompt has no token of its own


def test_a_tokenizer_may_have_no_template_or_several():
    """Dialogues with tools take the template of that name, as in transformers; the others the default."""
    tokenizer = tokenizer_for("qwen-2.5")
    turns = user("ask"), assistant("one")
    with_tools = Conversation((*turns,), (False, True), TOOLS)
    default = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    default += "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    tokenizer.chat_template = {"default": default, "tool_use": tokenizer.chat_template}
    plain, called = rows(tokenizer, Conversation(turns, (False, True)), with_tools)
    for row, tools in ((plain, None), (called, [*TOOLS])):
        prompt = tokenizer.apply_chat_template([turns[0]], tools=tools, add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(row.input_ids).startswith(prompt + "one<|im_end|>")
    tokenizer.chat_template = None
    assert not encoder(tokenizer).has_template
    assert len(rows(tokenizer, Document("", "free text"))) == 1
    with pytest.raises(InputError, match="no chat template"):
        rows(tokenizer, with_tools)
