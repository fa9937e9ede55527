"""Split, caps and counts go by row of the source, whatever the template and the length make of it."""

import json
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config.data_section import DataConfig
from engine.config.parsing import parse
from engine.config.trial import ModelConfig
from engine.data import row_pipeline
from engine.data.account import account_data
from engine.data.readers import read_rows
from engine.data.row_pipeline import RowPipeline
from engine.data.source_files import NamedSource, find_source
from engine.data.tokens import TokenSet, tokenise
from engine.data.view import View
from engine.data.views import load_data
from engine.dialogue.conversation import Encoded
from engine.dialogue.encoding import Encoder
from engine.errors import InputError
from engine.model.inspect import load_tokenizer

ONE_ROW = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THOUGHT = "{% if m['role'] == 'assistant' and loop.last %}(thought){% endif %}"
ONE_ROW_PER_TURN = ONE_ROW.replace("{{ m['content'] }}", THOUGHT + "{{ m['content'] }}")
TEMPLATES = {"one row a dialogue": ONE_ROW, "one row a turn": ONE_ROW_PER_TURN}


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return load_tokenizer(ModelConfig(path=str(tiny_model_dir)))


@pytest.fixture
def config(tmp_path):
    def _config(rows, **options):
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {"train": str(tmp_path / "train.jsonl"), "max_seq_length": 512, "eval_max_seq_length": 512, **options}
        if options.get("chat_template") in TEMPLATES.values():
            (tmp_path / "t.jinja").write_text(options["chat_template"])
            given["chat_template"] = str(tmp_path / "t.jinja")
        return parse(DataConfig, given)

    return _config


def dialogue(i, turns=4):
    contents = [{"role": role, "content": f"{role[0]}{i} {turn}"} for turn in range(turns) for role in ("user", "assistant")]
    return {"messages": contents}


def texts(view, tokenizer):
    return [tokenizer.decode(view[i].input_ids) for i in range(len(view))]


def dialogues_in(view, tokenizer):
    return {text.split("u")[2].split(" ")[0] for text in texts(view, tokenizer)}  # behind "<|u" of the role


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_no_evaluation_dialogue_is_trained(config, tokenizer, template):
    rows = [dialogue(i) for i in range(40)] + [dialogue(3), dialogue(4)]
    train, evaluation = load_data(config(rows, chat_template=template, eval_fraction=0.25), tokenizer)
    trained, scored = dialogues_in(train, tokenizer), dialogues_in(evaluation, tokenizer)
    assert len(trained) + len(scored) == 40 and not trained & scored
    assert train.num_rows + evaluation.num_rows == 42 and 10 <= evaluation.num_rows <= 12
    assert len(evaluation) == evaluation.num_rows * (4 if template == ONE_ROW_PER_TURN else 1)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_caps_count_dialogues(config, tokenizer, template):
    rows = [dialogue(i) for i in range(20)]
    capped = config(rows, chat_template=template, eval_fraction=0.5, train_max_samples=3, eval_max_samples=2)
    train, evaluation = load_data(capped, tokenizer)
    assert (train.num_rows, evaluation.num_rows) == (3, 2)
    again, _ = load_data(config(rows[::-1], chat_template=template, eval_fraction=0.5, train_max_samples=3), tokenizer)
    assert sorted(texts(again, tokenizer)) == sorted(texts(train, tokenizer))


def test_where_a_row_is_a_sample_the_split_is_that_of_older_sweeps(config, tokenizer):
    """The digests were recorded before the split went by row."""
    train, evaluation = load_data(config([dialogue(i) for i in range(40)], chat_template=ONE_ROW), tokenizer)
    assert (train.digest(), evaluation.digest()) == ("6b4c815e8a147ff8", "e8ba3fb2b2028245")


def sample(length, first=1):
    return Encoded(list(range(length)), [i >= first for i in range(length)])


def token_set(folder, *rows):
    folder.mkdir(exist_ok=True)
    tokenise(((list(row), False, None) for row in rows), folder)
    return TokenSet.load(folder)


def pieces(view):
    return [(view[i].input_ids.tolist(), view[i].is_target.tolist()) for i in range(len(view))]


def test_what_is_longer_is_cut_dropped_split_or_refused(tmp_path):
    tokens = token_set(tmp_path / "t", [sample(10)], [sample(25)], [sample(30, first=22)])
    rows = np.arange(3)
    cut = View(tokens, rows, 10)
    assert [len(ids) for ids, _ in pieces(cut)] == [10, 10] and (cut.num_cut, cut.num_dropped, cut.num_rows) == (1, 1, 2)
    assert cut.num_given_tokens - cut.num_used_tokens == 45
    dropped = View(tokens, rows, 25, "drop")
    assert [len(ids) for ids, _ in pieces(dropped)] == [10, 25] and (dropped.num_cut, dropped.num_dropped) == (0, 1)
    split = View(tokens, rows, 10, "split")
    assert [ids for ids, _ in pieces(split)] == [
        list(range(10)), list(range(10)), list(range(9, 19)), list(range(18, 25)), list(range(18, 28)), list(range(27, 30)),
    ]  # fmt: skip
    assert (split.num_cut, split.num_dropped, split.num_rows) == (0, 0, 3)
    said = "data.overlong = 'error': 2 of 3 training samples are longer than 10 tokens, the longest has 30"
    with pytest.raises(InputError, match=said):
        View(tokens, rows, 10, "error")
    assert len(View(tokens, rows, 30, "error")) == 3


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_target_is_learnt_once_however_samples_are_split(tmp_path, data):
    masks = st.lists(st.booleans(), min_size=2, max_size=40).filter(lambda mask: any(mask[1:]))
    rows = data.draw(st.lists(st.lists(masks, min_size=1, max_size=3), min_size=1, max_size=5))
    length, counter = data.draw(st.integers(8, 20)), iter(range(10_000))
    encoded = [[Encoded([next(counter) for _ in mask], mask) for mask in row] for row in rows]
    tokens = token_set(tmp_path / "p", *encoded)
    assert tokens.num_rows == len(rows) and len(tokens) == sum(map(len, rows))
    wanted = [i for row in encoded for e in row for i, hit in list(zip(e.input_ids, e.is_target))[1:] if hit]
    view = View(tokens, np.arange(len(rows)), length, "split")
    learnt = [i for ids, mask in pieces(view) for i, hit in list(zip(ids, mask))[1:] if hit]
    assert sorted(learnt) == sorted(wanted) and view.num_targets() == len(wanted)
    seen = {i for ids, _ in pieces(view) for i in ids}
    assert view.num_used_tokens <= view.num_given_tokens and len(seen) >= len(wanted)
    cut = View(tokens, np.arange(len(rows)), length)
    kept = [e for row in encoded for e in row if any(e.is_target[1:length])]
    assert pieces(cut) == [(e.input_ids[:length], e.is_target[:length]) for e in kept]
    assert cut.num_targets() == sum(sum(e.is_target[1:length]) for e in kept)


def test_the_account_says_what_became_of_every_row(config, tokenizer):
    rows = [{"prompt": "p", "completion": f"c{i % 30}" + "x" * (200 * (i % 10 == 0))} for i in range(40)] + [{"prompt": "p"}] * 10
    given = config(rows, bad_rows="skip", eval_fraction=0.2, max_seq_length=64, eval_max_seq_length=64)
    _, _, (training, evaluation) = account_data(given, tokenizer)
    assert (training.num_read, training.num_bad) == (50, 10)
    assert training.num_chosen + evaluation.num_chosen == 40 and training.num_eos == 40
    assert training.num_equal + evaluation.num_equal == 10
    assert training.num_cut + evaluation.num_cut == 4 and training.num_used == training.num_samples
    line = training.line()
    assert line.startswith("training at 64 tokens: 50 rows read (10 bad") and "tokens lost" in line and "EOS to 40" in line
    assert any("lose 2" in text and "rows" in text for text in training.warnings())


def test_one_of_each_is_singular(config, tokenizer, tmp_path):
    (tmp_path / "eval.jsonl").write_text('{"text": "t1"}\n')
    given = config([{"text": "t1"}], eval=str(tmp_path / "eval.jsonl"), max_seq_length=8, eval_max_seq_length=8)
    _, _, both = account_data(given, tokenizer)
    lines = [line for account in both for line in (account.line(), *account.warnings())]
    assert all("1 row read" in account.line() for account in both) and "1 of 1 evaluation row is a training row too" in lines
    plural = r"(?<![\d,.])1 \w*(rows|samples|tokens)"
    assert not [line for line in lines if re.search(plural, line)] and re.search(plural, "of 1 rows")
    cut = config([{"text": "t" * 9}], eval=str(tmp_path / "eval.jsonl"), max_seq_length=8, eval_max_seq_length=8)
    assert "(1 sample cut)" in account_data(cut, tokenizer)[2][0].line()


@pytest.mark.parametrize("overlong", ["error", "drop", "cut"])
@pytest.mark.parametrize("part", ["training", "evaluation"])
def test_what_is_too_long_is_said_of_its_part(config, tokenizer, tmp_path, part, overlong):
    (tmp_path / "eval.jsonl").write_text('{"prompt": "pppppppppppp", "completion": "c"}\n')
    lengths = {"max_seq_length": 8 if part == "training" else 64, "eval_max_seq_length": 8 if part == "evaluation" else 64}
    row = {"prompt": "p" * 12, "completion": "c"}
    given = config([row], eval=str(tmp_path / "eval.jsonl"), overlong=overlong, **lengths)
    with pytest.raises(InputError, match=f"1 {part} sample") as caught:
        load_data(given, tokenizer)
    assert str(caught.value).startswith("data.overlong = 'error'" if overlong == "error" else "data.")


def test_an_odd_first_row_does_not_decide_the_format(config, tokenizer):
    rows = [{"text": "odd"}, *({"prompt": f"p{i}", "completion": "c"} for i in range(20))]
    train, evaluation, (training, _) = account_data(config(rows, bad_rows="skip"), tokenizer)
    assert training.num_bad == 1 and train.num_rows + evaluation.num_rows == 20
    assert "line 1 of train.jsonl" in training.bad_rows[0] and "column 'prompt' is missing" in training.bad_rows[0]
    with pytest.raises(InputError, match="line 1 of train.jsonl = .*'prompt' is missing"):
        load_data(config(rows), tokenizer)


def test_columns_that_cannot_be_meant_end_the_set_even_where_bad_rows_are_skipped(config, tokenizer):
    rows = [{"prompt": "p", "completion": "c"}] * 3
    for columns in ({"prompt": "completion"}, {"history": "prompt"}, {"tools": "functions"}):
        with pytest.raises(InputError, match="^data.columns = "):
            load_data(config(rows, columns=columns, bad_rows="skip"), tokenizer)


def test_a_repeated_prompt_is_learnt_once_and_said(config, tokenizer):
    prompt = "What is the capital of France? "
    rows = [{"prompt": prompt, "chosen": f"{prompt}Paris {i}", "rejected": "b"} for i in range(4)]
    train, _, (training, _) = account_data(config(rows, columns={"completion": "chosen"}), tokenizer)
    assert all(text.count("capital") == 1 for text in texts(train, tokenizer))
    assert "repeats its prompt is learnt from behind it (4 rows)" in training.line()


def test_evaluation_rows_that_are_trained_are_counted(config, tokenizer, tmp_path):
    (tmp_path / "eval.jsonl").write_text('{"text": "t1"}\n{"text": "new"}\n')
    given = config([{"text": f"t{i}"} for i in range(4)], eval=str(tmp_path / "eval.jsonl"))
    _, _, (_, evaluation) = account_data(given, tokenizer)
    assert evaluation.num_leaked == 1 and "1 of 2 evaluation rows is a training row too" in evaluation.warnings()
    with pytest.raises(InputError, match=r"data.eval = .*data.eval=train means these"):
        load_data(given.model_copy(update={"eval": given.train}), tokenizer)


def test_a_bad_row_ends_the_set_unless_it_is_skipped(config, tokenizer):
    rows = [{"text": f"t{i}"} for i in range(600)]
    rows[301] = {"text": "\ud800"}
    with pytest.raises(InputError, match=r"data.train line 302 of train.jsonl = .*half a surrogate pair"):
        load_data(config(rows), tokenizer)
    train, evaluation, (training, _) = account_data(config(rows, bad_rows="skip", eval_max_samples=600), tokenizer)
    assert train.num_rows + evaluation.num_rows == 599 and training.num_bad == 1
    with pytest.raises(InputError, match="line 1 .*column"):
        load_data(config([{"other": "t"}] * 3, bad_rows="skip"), tokenizer)


def test_a_loss_mask_of_the_data_changes_their_digest(config, tokenizer):
    rows = [dialogue(i) for i in range(10)]
    before = load_data(config(rows, eval="train"), tokenizer)[0]
    rows[0]["messages"][3]["weight"] = 0
    after = load_data(config(rows, eval="train"), tokenizer)[0]
    assert texts(before, tokenizer) == texts(after, tokenizer) and before.digest() != after.digest()
    assert before.num_targets() > after.num_targets()


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_how_many_rows_are_worked_on_at_once_changes_no_token(config, tokenizer, monkeypatch, template):
    rows = [dialogue(i) for i in range(12)] + [{"messages": [{"role": "user", "content": "no answer"}]}]
    given = config(rows, chat_template=template, eval="train", bad_rows="skip")
    encoder, sizes, found = Encoder(tokenizer, given), [], []
    for limit in (10**6, 300, 1):
        monkeypatch.setattr(row_pipeline, "BATCH_CHARACTERS", limit)
        monkeypatch.setattr(row_pipeline, "RENDERED_CHARACTERS", limit)
        encode = encoder.encode
        asked = []
        counting = lambda texts, encode=encode, asked=asked: asked.append(len(texts)) or encode(texts)  # noqa: E731
        monkeypatch.setattr(encoder, "encode", counting)
        source = NamedSource("data.train", (given.train,))
        found.append(list(RowPipeline(given, encoder, tokenizer).encoded(read_rows(source, find_source(source)))))
        monkeypatch.setattr(encoder, "encode", encode)
        sizes.append(max(asked))
    assert found[0] == found[1] == found[2] and len(found[0]) == 12
    assert sizes[0] == 12 and sizes[1] < 8 and sizes[2] == 1


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Rows arrive one by one, and the arrays are on the disk before the last one is asked for."""
    half = []

    def rows():
        for i in range(4000):
            if i == 2000:
                half.append((tmp_path / "input_ids.npy").stat().st_size)
            yield [sample(100)], False, None

    tokenise(rows(), tmp_path)
    assert half[0] > 2000 * 100 * 4 * 0.6
    tokens = TokenSet.load(tmp_path)
    assert len(tokens) == 4000 and tokens.input_ids[399_999] == 99
