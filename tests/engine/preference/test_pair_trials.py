"""A trial learns from pairs: it resumes exactly, divides steps freely, and keeps what the reference says of them."""

import itertools
import os

import numpy as np
import pytest

import engine.preference.reference_logps
from engine.data.account import account_data
from engine.data.views import load_data
from engine.errors import InputError, Interrupted
from engine.evaluation.reevaluate import evaluate_adapter
from engine.model.inspect import load_tokenizer
from engine.model.load import load_base
from engine.preference.reference_logps import reference_logps, wanted_samples
from engine.sample_losses import read_sample_losses
from engine.training.loop import train
from tests.support.preferences import pair_rows, preference_values, sum_and_count, write_rows
from tests.support.trials import CPU, build, run, same_numbers


@pytest.fixture
def values(tiny_config, tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl", pair_rows(32))
    values = preference_values(tiny_config, data, loss="dpo", beta=0.5)
    values["train"].update(max_tokens=1536, num_reports=2, tokens_per_step=512)
    return values


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_SWEEP_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_a_trial_learns_to_prefer_and_its_files_agree(values, tmp_path, loss):
    config = build(values, preference={"loss": loss})
    reports = run(config, tmp_path / "trial")
    last = reports[-1]
    assert last.metrics["preference_accuracy"] > 0.9
    losses = read_sample_losses(tmp_path / "trial", last)
    assert losses.mean == last.eval_loss and losses.preference_accuracy == last.metrics["preference_accuracy"]
    again = evaluate_adapter(config, tmp_path / "trial" / "adapter")
    assert again.eval_loss == pytest.approx(last.eval_loss, rel=1e-4)
    assert again.metrics == last.metrics
    if loss == "dpo":
        assert again.base_eval_loss == pytest.approx(np.log(2.0)) and again.base_metrics["preference_accuracy"] == 0.0
        assert last.eval_loss < 0.6


def test_a_stopped_trial_goes_on_with_the_numbers_of_an_undisturbed_one(values, tmp_path):
    config = build(values, lora={"lora_dropout": 0.1})
    base = load_base(config.model, CPU)
    whole = run(config, tmp_path / "whole", base)
    (tmp_path / "pieces").mkdir()
    reports = []
    for end in (2, 5, 10**9):  # in the reference's pass, in training, and not at all
        calls = itertools.count()
        try:
            reports += train(config, tmp_path / "pieces", base=base, interrupted=lambda end=end, calls=calls: next(calls) == end)
        except Interrupted:
            assert end < 10
    assert same_numbers(whole, reports)
    names = ("adapter/adapter_model.safetensors", "checkpoint/adapter.safetensors")
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "pieces" / name).read_bytes() for name in names)


def test_the_size_of_a_micro_batch_changes_rounding_alone(values, tmp_path):
    base = load_base(build(values).model, CPU)
    one, two = (run(build(values, train={"micro_batch_size": n}), tmp_path / str(n), base) for n in (1, 2))
    assert [r.step for r in one] == [r.step for r in two]
    assert [r.eval_loss for r in one] == pytest.approx([r.eval_loss for r in two], rel=1e-3)
    assert [r.train_loss for r in one] == pytest.approx([r.train_loss for r in two], rel=1e-3)


def test_the_reference_is_the_library_s_and_is_computed_once(values, monkeypatch):
    values["model"] |= {"quantization": "none"}
    config = build(values)
    base = load_base(config.model, CPU)
    train_view, _ = load_data(config.data, base.tokenizer)
    calls = []
    first = reference_logps(config, base, train_view, before_each=lambda: calls.append(1))
    assert calls
    again = reference_logps(config, base, train_view, before_each=lambda: pytest.fail("computed again"))
    assert np.array_equal(first, again)
    # another rank and rate share it, another start or precision does not
    other = build(values, lora={"rank": 8}, optim={"learning_rate": 1e-3}, preference={"beta": 0.1})
    reference_logps(other, base, train_view, before_each=lambda: pytest.fail("computed again"))
    plain = load_base(config.model.model_copy(update={"layers": "original"}), CPU)
    plain.model.set_attn_implementation("sdpa")
    truth = [sum_and_count(plain.model, train_view[i])[0].item() for i in range(8)]
    assert first[:8] == pytest.approx(truth, rel=1e-5)


def test_a_reference_pass_that_was_ended_goes_on_where_it_was(values, monkeypatch):
    monkeypatch.setattr(engine.preference.reference_logps, "PART_TOKENS", {"cpu": 512})
    config = build(values)
    base = load_base(config.model, CPU)
    view, _ = load_data(config.data, base.tokenizer)
    computed = []

    def end():
        computed.append(1)
        if len(computed) == 3:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        reference_logps(config, base, view, before_each=end)
    rest = []
    found = reference_logps(config, base, view, before_each=lambda: rest.append(1))
    assert not np.isnan(found).any()
    whole = reference_logps(config, base, view, np.arange(len(view)))
    assert np.array_equal(found, whole)
    assert len(rest) < len(view) // 2 and base.model.training is False


def test_the_parts_used_last_are_kept(values, monkeypatch, tmp_path):
    monkeypatch.setattr(engine.preference.reference_logps, "PART_TOKENS", {"cpu": 512})
    config = build(values)
    base = load_base(config.model, CPU)
    view, _ = load_data(config.data, base.tokenizer)
    cache, halves = tmp_path / "cache", np.split(np.arange(len(view)), [len(view) // 2])
    reference_logps(config, base, view, halves[0])
    first = set(cache.glob("reference-*"))
    for folder in first:
        os.utime(folder, (1, 1))
    monkeypatch.setattr(engine.preference.reference_logps, "MOST", 2 * len(first))
    reference_logps(config, base, view, halves[1])
    second = set(cache.glob("reference-*")) - first
    reference_logps(config, base, view, halves[0], before_each=lambda: pytest.fail("computed again"))
    for folder in second:
        os.utime(folder, (1, 1))
    monkeypatch.setattr(engine.preference.reference_logps, "MOST", len(first))
    reference_logps(config, base, view, halves[0], before_each=lambda: pytest.fail("computed again"))
    assert len(first) > 1 and set(cache.glob("reference-*")) == first


def test_only_pairs_that_a_trial_can_see_are_computed(values):
    config = build(values)
    base = load_base(config.model, CPU)
    view, _ = load_data(config.data, base.tokenizer)
    whole = build(values, train={"max_tokens": 8192, "num_reports": 1})
    assert np.array_equal(wanted_samples(whole, view), np.arange(len(view)))
    short = build(values, train={"max_tokens": 256, "num_reports": 1, "tokens_per_step": 256})
    wanted = wanted_samples(short, view)
    assert 0 < len(wanted) < len(view) and np.array_equal(wanted[0::2] + 1, wanted[1::2])


@pytest.mark.parametrize(("section", "changes", "field"), [
    ("data", {"overlong": "split"}, "data.overlong"),
    ("data", {"format": "auto"}, "preference.beta"),
    ("preference", {"loss": "orpo", "label_smoothing": 0.1}, "preference.label_smoothing"),
    ("preference", {"label_smoothing": 0.5}, "preference.label_smoothing"),
    ("preference", {"beta": 0.0}, "preference.beta"),
    ("train", {"matmul": "int8"}, "train.matmul"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(values, section, changes, field):
    with pytest.raises(InputError) as error:
        build(values, **{section: changes})
    assert error.value.field == field


def test_the_account_counts_pairs_and_leaves_out_both_answers(values, tmp_path):
    long = {"prompt": "w" * 30, "chosen": "x" * 200, "rejected": "y"}  # only the rejected answer would fit
    late = {"prompt": "w" * 150, "chosen": "x", "rejected": "y"}  # nothing of the answers is left
    alike = {"prompt": "w", "chosen": "x" * 200 + "y", "rejected": "x" * 200 + "z"}  # equal as far as the length goes
    values["data"]["train"] = str(write_rows(tmp_path / "odd.jsonl", [*pair_rows(20), long, late, alike]))
    tokenizer = load_tokenizer(build(values).model)
    for overlong, dropped, cut in (("cut", 2, 1), ("drop", 3, 0)):
        config = build(values, data={"overlong": overlong, "eval": "train"}).data
        view, _, (training, evaluation) = account_data(config, tokenizer)
        assert (training.num_pairs, training.num_dropped, training.num_cut) == (23 - dropped, dropped, cut)
        assert f"{23 - dropped} pairs used" in training.line() and evaluation.num_pairs == 23 - dropped
        assert len(view) == 2 * training.num_pairs
