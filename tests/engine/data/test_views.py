"""Data come in several formats, have loss only on assistant text, and are split by content."""

import json

import numpy as np
import pytest

from engine.config.data_section import DataConfig
from engine.config.parsing import parse
from engine.config.trial import ModelConfig
from engine.data.tokens import TokenSet
from engine.data.views import load_data, split_by_content
from engine.dialogue.templates import CHATML
from engine.errors import InputError
from engine.model.inspect import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return load_tokenizer(ModelConfig(path=str(tiny_model_dir)))


@pytest.fixture
def load(tmp_path, tokenizer):
    def _load(rows, **options):
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {"train": str(path), "max_seq_length": 128, "eval_max_seq_length": 128, "eval_fraction": 0.5, **options}
        return load_data(parse(DataConfig, config), tokenizer)

    return _load


def learnt(view, tokenizer):
    """Return the texts with loss, per sample."""
    samples = [view[i] for i in range(len(view))]
    return sorted(tokenizer.decode(s.input_ids[s.is_target]) for s in samples)


def chat(*contents):
    return {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant") * len(contents), contents)]}


def test_only_assistant_turns_carry_loss(load, tokenizer):
    train, evaluation = load([chat("q1", "a1", "q2", "a2"), chat("q3", "a3")])
    assert sorted(learnt(train, tokenizer) + learnt(evaluation, tokenizer)) == ["a1<|end|>a2<|end|>", "a3<|end|>"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "say hi: ", "completion": "hi"}, "hi<|end|>"),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}, "a<|end|>"),
        ({"text": "plain"}, "plain<|end|>"),
        ({"instruction": "do", "input": "this", "output": "done"}, "done<|end|>"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "a<|end|>"),
    ],
)
def test_each_format_is_recognised_by_its_columns(load, tokenizer, row, expected):
    other = json.loads(
        json.dumps(row).replace('"hi"', '"ho"').replace("plain", "other").replace("done", "gone").replace('"a"', '"b"')
    )
    train, evaluation = load([row, other])
    assert expected in learnt(train, tokenizer) + learnt(evaluation, tokenizer)


def test_a_template_that_rewrites_earlier_turns_gives_one_sample_per_turn(load, tokenizer, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' and loop.last %}(thought){% endif %}"
        "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    train, evaluation = load([chat("q1", "a1", "q2", "a2"), chat("q3", "a3")], chat_template=str(template))
    texts = learnt(train, tokenizer) + learnt(evaluation, tokenizer)
    assert sorted(texts) == ["(thought)a1<|end|>", "(thought)a2<|end|>", "(thought)a3<|end|>"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([chat("q", "a"), {"messages": [{"role": "user", "content": "only a question"}]}], "line 2.*no assistant message"),
        ([chat("q", "a"), {"prompt": "p", "completion": "c"}], "line 2.*'messages'|messages must be"),
        ([{"question": "q", "answer": "a"}], r"columns fit no format.*messages"),
        ([], "at least one sample"),
        ([chat("q", "a"), chat("q", "a")], "2 different samples"),
        ([chat("q", 3)], "line 1"),
    ],
)
def test_bad_data_is_one_line_that_names_the_sample(load, rows, message):
    with pytest.raises(InputError, match=message) as caught:
        load(rows)
    assert "\n" not in str(caught.value)


def test_broken_json_and_missing_files_are_named(tmp_path, tokenizer):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(InputError, match="line 2.*must be JSON"):
        load_data(DataConfig(train=str(path)), tokenizer)
    with pytest.raises(InputError, match=r"data\.train.*no such file"):
        load_data(DataConfig(train=str(tmp_path / "none.jsonl")), tokenizer)


def test_samples_whose_targets_are_all_cut_off_are_left_out_and_counted(load):
    rows = [chat("q" * (80 if i % 2 else 5) + str(i), "a") for i in range(40)]
    train, _ = load(rows, max_seq_length=40, eval_fraction=0.1)
    assert train.num_dropped > 0 and len(train) > 0
    with pytest.raises(InputError, match=r"data\.max_seq_length = 8"):
        load(rows, max_seq_length=8)


def test_equal_samples_never_fall_on_both_sides():
    hashes = np.array([5, 1, 5, 9, 1, 7, 1, 3], dtype=np.uint64)
    train, evaluation = split_by_content(hashes, 0.25)
    assert not set(hashes[train]) & set(hashes[evaluation])
    assert sorted([*train, *evaluation]) == list(range(8))


def test_chatml_can_be_named_where_a_tokenizer_has_no_template(tokenizer):
    from engine.dialogue.templates import chat_template

    assert chat_template(tokenizer, "chatml") == CHATML
    with pytest.raises(InputError, match=r"data\.chat_template.*chatml"):
        chat_template(tokenizer, "no-such-template")


def test_a_builtin_can_be_the_evaluation_set_of_other_data(monkeypatch):
    from pathlib import Path

    from engine.data import views as data

    monkeypatch.setattr(data, "resolve_data", lambda p, _: (Path("a/train"), Path("a/eval")) if p[:8] == "builtin:" else None)

    def paths(config):
        return tuple(source and str(source) for source in data.sources_of(config))

    assert paths(DataConfig(train="builtin:x")) == ("a/train", "a/eval")
    assert paths(DataConfig(train="my.jsonl", eval="builtin:x")) == ("my.jsonl", "a/eval")
    assert paths(DataConfig(train="builtin:x", eval="my.jsonl")) == ("a/train", "my.jsonl")
    assert paths(DataConfig(train="my.jsonl")) == ("my.jsonl", None)


def test_train_max_samples_takes_the_same_samples_wherever_they_stand(load, tokenizer):
    rows = [chat(f"q{i}", f"a{i}") for i in range(12)]
    few = learnt(load(rows, train_max_samples=3)[0], tokenizer)
    assert len(few) == 3 and few == learnt(load(rows[::-1], train_max_samples=3)[0], tokenizer)
    everything, evaluation = (set(learnt(view, tokenizer)) for view in load(rows))
    assert set(few) < everything and not set(few) & evaluation
    assert len(load(rows, train_max_samples=100)[0]) == 6


def test_evaluation_can_be_on_the_training_samples_themselves(load, tokenizer):
    rows = [chat(f"q{i}", f"a{i}") for i in range(12)]
    train, evaluation = load(rows, eval="train", train_max_samples=3, eval_max_samples=3)
    assert learnt(train, tokenizer) == learnt(evaluation, tokenizer) and len(train) == 3
    train, evaluation = load(rows, eval="train")
    assert len(train) == len(evaluation) == 12


def test_trials_of_a_node_map_the_same_tokens_and_none_can_change_them(load):
    """Processes with different sequence lengths share one copy in the page cache."""
    rows = [{"prompt": f"say {i}", "completion": "yes"} for i in range(20)]
    one, other = (load(rows, max_seq_length=length)[0]._tokens for length in (64, 32))
    for name in TokenSet.__dataclass_fields__:
        mine, theirs = getattr(one, name), getattr(other, name)
        assert isinstance(mine, np.memmap) and mine.filename == theirs.filename and mine is not theirs
        with pytest.raises(ValueError, match="read-only"):
            mine[:1] = 0
