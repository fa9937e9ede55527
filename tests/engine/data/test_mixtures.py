"""A mixture gives each source its share of the tokens, deterministically, and goes on exactly."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pytest

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.data import views
from engine.data.account import account_data
from engine.data.packing import Cursor, Mixture, plan_epoch
from engine.data.view import make_cursor
from engine.data.views import identify_samples, load_data
from engine.errors import InputError
from engine.training.loop import train
from tests.support.trials import build, run, same_numbers

LENGTHS = [np.array([10, 20, 30, 20]), np.full(50, 8), np.array([200])]


def row(asked, answered):
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}


@pytest.fixture
def files(tmp_path):
    """Write two files of different size, and an empty one."""
    sums = [row(f"What is {i} plus {i}?", f"It is {i + i}.") for i in range(40)]
    others = [row(f"Say number {i}.", f"This is {i}, and it is a rather long answer.") for i in range(12)]
    for name, rows in (("sums", sums), ("others", others), ("empty", [])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("sums", "others", "empty")}


def mixed(tiny_config, files, *weights, **data):
    sources = [{"path": files[name], "weight": weight} for name, weight in zip(("sums", "others"), weights, strict=True)]
    return build(tiny_config, data={"train": sources, **data})


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (5.0, 0.01, 2.0), (0.0, 1.0, 0.0), (1e6, 1e-3, 1.0)])
def test_sources_have_their_share_of_tokens_and_each_sample_comes_before_any_again(weights):
    mixture, lengths = Mixture.of(LENGTHS, weights), np.concatenate(LENGTHS)
    source = np.repeat([0, 1, 2], [len(one) for one in LENGTHS])
    tokens, drawn = np.zeros(3), Counter()
    for epoch in range(200):
        samples = mixture.draw(7, epoch)
        drawn.update(samples.tolist())
        tokens += np.bincount(source[samples], lengths[samples], minlength=3)
        for one in range(3):
            counts = [drawn[i] for i in np.flatnonzero(source == one)]
            assert max(counts) - min(counts) <= 1
    assert tokens / tokens.sum() == pytest.approx(np.array(weights) / sum(weights), abs=2e-3)
    assert tokens.sum() == pytest.approx(200 * lengths.sum(), rel=5e-3), "an epoch has the tokens of all sources"


def test_an_epoch_follows_from_seed_and_number_alone_and_its_bins_hold_what_was_drawn():
    mixture, lengths = Mixture.of(LENGTHS, (3.0, 1.0, 2.0)), np.concatenate(LENGTHS)
    for epoch in (0, 5):
        bins = plan_epoch(lengths, 256, True, 3, epoch, mixture)
        assert Counter(i for one in bins for i in one) == Counter(mixture.draw(3, epoch).tolist())
        assert all(lengths[one].sum() <= 256 for one in bins)
        assert bins == plan_epoch(lengths, 256, True, 3, epoch, Mixture.of(LENGTHS, (6.0, 2.0, 4.0))), "only ratios count"
        assert bins != plan_epoch(lengths, 256, True, 4, epoch, mixture)
    whole, parts = (Cursor(lengths, 256, True, 3, mixture) for _ in range(2))
    steps = [whole.take(3) for _ in range(30)]
    for i, expected in enumerate(steps):
        assert parts.take(3) == expected
        if i % 4 == 0:
            again = Cursor(lengths, 256, True, 3, mixture)
            again.seek(parts.epoch, parts.position)
            parts = again


def test_a_trial_on_a_mixture_goes_on_bit_for_bit(tiny_config, tmp_path, base, files):
    config = mixed(tiny_config, files, 3.0, 1.0)
    whole = run(config, tmp_path / "whole", base)
    for _ in train(config, tmp_path / "parts", base=base):
        break
    rest = run(config, tmp_path / "parts", base)
    assert same_numbers(whole, [*whole[:1], *rest])
    other = run(mixed(tiny_config, files, 1.0, 3.0), tmp_path / "other", base)
    assert other[-1].eval_loss != whole[-1].eval_loss and other[0].train_loss != whole[0].train_loss


def test_weights_change_neither_what_is_held_out_nor_what_is_tokenised(tiny_config, base, files, monkeypatch):
    config = mixed(tiny_config, files, 3.0, 1.0)
    train_view, held_out, accounts = account_data(config.data, base.tokenizer)
    assert [account.part for account in accounts] == ["training", "training/0", "training/1", "evaluation"]
    assert accounts[0].num_tokens == accounts[1].num_tokens + accounts[2].num_tokens
    assert set(held_out.row_hashes).isdisjoint(train_view.row_hashes) and len(held_out.rows) + len(train_view.rows) == 52
    built = []
    monkeypatch.setattr(views, "tokenise", lambda *_: built.append(1))
    again = load_data(mixed(tiny_config, files, 0.0, 1.0).data, base.tokenizer)
    assert not built and identify_samples(again) == identify_samples((train_view, held_out))
    assert {"training/0", "training/1"} <= set(identify_samples(again))
    assert config.fingerprint() != mixed(tiny_config, files, 3.5, 1.0).fingerprint()
    drawn = make_cursor(again[0], mixed(tiny_config, files, 0.0, 1.0)).take(5)
    assert min(i for one in drawn for i in one) >= len(again[0].parts["0"])


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ([("sums", 0.0), ("others", 0.0)], r"data.train = \[0.0, 0.0\]: must have a weight above 0"),
        ([("sums", 1.0), ("sums", 2.0)], "data.train.1 = .*is data.train.0 too"),
        ([("sums", 1.0), ("empty", 1.0)], "data.train.1 = .*empty"),
        ([("sums", 1.0), ("nope", 1.0)], "data.train.1 = 'nope.jsonl': no such file"),
        ([("sums", -1.0)], "data.train.0.weight = -1.0"),
        ([("sums", 1.0)] * 17, "data.train = '17 sources': must mix at most 16"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_one_line(tiny_config, base, files, sources, said):
    listed = [{"path": files.get(name, f"{name}.jsonl"), "weight": weight} for name, weight in sources]
    with pytest.raises(InputError, match=said) as error:
        load_data(build(tiny_config, data={"train": listed}).data, base.tokenizer)
    assert "\n" not in str(error.value)


def test_the_same_samples_under_two_names_are_one_line_and_so_is_a_setting_of_one_source(tiny_config, tmp_path, base, files):
    copy = tmp_path / "copy.jsonl"
    shutil.copy(files["sums"], copy)
    config = build(tiny_config, data={"train": [{"path": files["sums"]}, str(copy)]})
    with pytest.raises(InputError, match="data.train.1 = .*copy.jsonl.*same samples as data.train.0"):
        load_data(config.data, base.tokenizer)
    with pytest.raises(InputError, match="data.train_split = 'test': belongs to each of several"):
        build(tiny_config, data={"train": [{"path": "a.jsonl"}], "train_split": "test"})
    assert parse(TrainConfig, config.model_dump(mode="json")) == config
