"""A trial evaluates each set on its own, keeps the best adapter within the limits, and goes on exactly."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from engine.adapter.lora import attach, detach
from engine.adapter.peft_files import load_adapter
from engine.config.parsing import to_json
from engine.config.trial import load_train_config
from engine.data.views import identify_samples, load_data, load_recorded
from engine.errors import InputError, InputsChanged, Interrupted
from engine.evaluation.eval_loss import evaluate, evaluation_batches
from engine.evaluation.reevaluate import evaluate_adapter
from engine.sample_losses import read_sample_losses
from engine.training.loop import train
from tests.support.trials import build, run, same_numbers

OTHER = "The moon is far away, and {} people have been there so far."


def row(asked, answered):
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}


@pytest.fixture
def files(tmp_path):
    """Write an evaluation set of sums, as the training data are, and one of plain text."""
    sums = [row(f"What is {i} plus {i}?", f"It is {i + i}.") for i in range(70, 78)]
    others = [row("Say it.", OTHER.format(i)) for i in range(6)]
    for name, rows in (("sums", sums), ("others", others)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("sums", "others")}


def with_sets(tiny_config, files, **data):
    return build(tiny_config, data={"eval": files, **data})


def alone(config, base, path):
    _, view = load_data(config.data.model_copy(update={"eval": path, "eval_weights": None, "eval_limits": {}}), base.tokenizer)
    return evaluate(base, evaluation_batches(base, view, config.data.eval_max_seq_length))


def test_each_set_has_the_losses_that_it_has_alone_and_the_eval_loss_is_their_weighted_mean(tiny_config, tmp_path, base, files):
    config = with_sets(tiny_config, files, eval_weights={"sums": 3.0, "others": 1.0})
    reports = run(config, tmp_path / "trial", base)
    last = reports[-1]
    assert list(last.eval_losses) == ["others", "sums"] and last.eval_excess is None
    assert last.eval_loss == pytest.approx((3 * last.eval_losses["sums"] + last.eval_losses["others"]) / 4, rel=1e-12)
    assert last.eval_loss == last.best_eval_loss
    layers = attach(base.model, base.linear_names, config.lora, 0)
    load_adapter(tmp_path / "trial" / "adapter", layers)
    for name, path in files.items():
        assert alone(config, base, path).mean == last.eval_losses[name], "the other set must not change a bit"
    detach(base.model, layers)
    kept = read_sample_losses(tmp_path / "trial", last)
    assert kept.means == last.eval_losses and kept.sets == {"others": 6, "sums": 8}
    again = evaluate_adapter(config, tmp_path / "trial" / "adapter")
    assert again.sample_losses.means == pytest.approx(last.eval_losses, rel=1e-5)
    assert again.base_sample_losses.means["others"] == pytest.approx(alone(config, base, files["others"]).mean, rel=1e-5)


def test_sets_that_do_not_weigh_are_reported_and_change_nothing(tiny_config, tmp_path, base, files):
    plain = run(build(tiny_config, data={"eval": files["sums"]}), tmp_path / "plain", base)
    several = run(with_sets(tiny_config, files, eval_weights={"sums": 1.0}), tmp_path / "several", base)
    assert [report.eval_loss for report in several] == [report.eval_loss for report in plain]
    assert all(report.eval_losses["others"] > report.eval_loss for report in several)
    ours, theirs = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("plain", "several"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_adapter_kept_is_the_best_within_the_limits(tiny_config, tmp_path, base, files):
    free = run(with_sets(tiny_config, files, eval_weights={"sums": 1.0}), tmp_path / "free", base)
    losses = [report.eval_losses["others"] for report in free]
    assert free[-1].eval_loss == min(report.eval_loss for report in free) and losses[0] > losses[-1]
    before = alone(build(tiny_config), base, files["others"]).mean
    middle = (losses[0] + losses[1]) / 2
    for limit in ({"at_most": middle}, {"above_base": middle - before}):
        config = with_sets(tiny_config, files, eval_weights={"sums": 1.0}, eval_limits={"others": limit})
        reports = run(config, tmp_path / str(list(limit)), base)
        assert [report.eval_excess > 0 for report in reports] == [True, False, False]
        assert [report.eval_excess for report in reports] == pytest.approx([loss - middle for loss in losses], abs=1e-6)
        assert [report.eval_loss for report in reports] == [report.eval_loss for report in free]
    # no rung keeps to this limit: the one that exceeds it least is kept, though another has the lowest loss
    config = with_sets(tiny_config, files, eval_weights={"others": 1.0}, eval_limits={"sums": {"above_base": -50.0}})
    reports = run(config, tmp_path / "never", base)
    nearest = min(reports, key=lambda report: report.eval_excess)
    assert nearest.eval_excess > 0 and reports[-1].best_eval_loss == nearest.eval_loss
    assert read_sample_losses(tmp_path / "never", nearest).mean == nearest.eval_loss


def test_a_trial_that_goes_on_keeps_the_limits_of_its_start(tiny_config, tmp_path, base, files, monkeypatch):
    config = with_sets(tiny_config, files, eval_limits={"others": {"above_base": -0.05}})
    whole = run(config, tmp_path / "whole", base)
    for _ in train(config, tmp_path / "parts", base=base):
        break
    base.lasting.clear()  # as in another process, which must not take the trained adapter for the base
    rest = run(config, tmp_path / "parts", base)
    assert same_numbers(whole, [*whole[:1], *rest]) and len(rest) == len(whole) - 1


def test_it_can_be_stopped_while_the_base_is_measured(tiny_config, tmp_path, base, files):
    config = with_sets(tiny_config, files, eval_limits={"others": {"above_base": 0.0}})
    with pytest.raises(Interrupted):
        next(train(config, tmp_path, base=base, interrupted=lambda: True))


def test_digests_cover_each_set_and_the_line_names_the_one_that_changed(tiny_config, base, files):
    config = with_sets(tiny_config, {**files, "own": None})
    views = load_data(config.data, base.tokenizer)
    found = identify_samples(views)
    assert {"evaluation/others", "evaluation/own", "evaluation/sums", "evaluation", "training"} == set(found)
    load_recorded(config, base.tokenizer, found)
    with open(files["others"], "a") as file:
        file.write(json.dumps(row("x", "y")) + "\n")
    with pytest.raises(InputsChanged, match="data.eval.others = .*the evaluation set others changed"):
        load_recorded(config, base.tokenizer, found)


def test_the_config_of_a_trial_comes_back_as_it_was(tiny_config, tmp_path, base, files):
    config = with_sets(tiny_config, files, eval_limits={"others": {"above_base": 0.0}})
    (tmp_path / "train_config.json").write_text(to_json(config))
    again = load_train_config(tmp_path / "train_config.json")
    assert again == config and again.fingerprint() == config.fingerprint()
    assert config.fingerprint() != with_sets(tiny_config, files).fingerprint()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"eval": {"a": "{sums}", "b": ["{sums}"]}}, "data.eval.b = .*same samples as data.eval.a"),
        ({"eval": {"a": "{sums}", "b": "{sums}"}}, "data.eval.b = .*is data.eval.a too"),
        ({"eval": {"a": None, "b": None}}, "data.eval.b = 'the held-out part of data.train'"),
        ({"eval": {"a": "nope.jsonl"}}, "data.eval.a = 'nope.jsonl': no such file"),
        ({"eval": {"a b": None}}, "data.eval = 'a b': must be the name"),
        ({"eval": {}}, "data.eval = {}"),
        ({"eval": {"a": None}, "eval_split": "test"}, "data.eval_split = 'test': belongs to each of several"),
        ({"eval": {"a": None}, "eval_weights": {"a": 0.0}}, "data.eval_weights = .*above 0"),
        ({"eval": {"a": None}, "eval_weights": {"b": 1.0}}, "data.eval_weights = 'b'.*there are a"),
        ({"eval_limits": {"b": {"at_most": 1.0}}}, "data.eval_limits = 'b'.*there are none"),
        ({"eval": {"a": None}, "eval_limits": {"a": {}}}, "must give above_base or at_most"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_one_line(tiny_config, base, files, data, said):
    if "eval" in data:
        named = {name: [one.format(**files) for one in path] if isinstance(path, list) else path and path.format(**files)
                 for name, path in data["eval"].items()}  # fmt: skip
        data = {**data, "eval": named}
    with pytest.raises(InputError, match=said) as error:
        load_data(build(tiny_config, data=data).data, base.tokenizer)
    assert "\n" not in str(error.value)
