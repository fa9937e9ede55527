"""A dry run checks model, data and template as a start does, and says what the hub kept from it."""

from __future__ import annotations

import re

import pytest

from engine.command_answers import Facts
from engine.errors import InputError
from engine.planning.cards import CARDS
from sweep import preflight
from sweep.__main__ import compose, main
from sweep.cluster.slots import Hardware
from sweep.config.absolute_paths import with_absolute_paths
from sweep.config.sweep import parse_sweep_config
from sweep.execution.engine_commands import CommandFailed
from sweep.folder.sweep_folder import SweepFolder
from sweep.plan.feasibility import Feasibility
from sweep.plan.forecast import most_demanding
from sweep.plan.samples import data_warnings, passes_line
from sweep.plan.sweep_plan import make_sweep_plan
from sweep.space.parse import parse_space
from sweep.trials.record import Outcome
from tests.support.fake_engine import SHAPE
from tests.support.prepared import prepared
from tests.support.studies import report, study_in, write_reports

SWEEP = ["model=local", "model.path=org/model", "data=local", "dry_run=true"]
DATA = ["data.train=t.jsonl"]


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    monkeypatch.setattr("sweep.cluster.slots.count_gpus", lambda: 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    return tmp_path


def fails(line, code=2):
    def command(*_):
        raise CommandFailed(line, code)

    return command


@pytest.mark.parametrize(
    "line", ["data.train = 't.jsonl': no such file", "data.chat_template = 'x': allowed: none",
             "data.train line 3 = '{': must be JSON", "lora.target_modules = 'x': matches no linear layer"]
)  # fmt: skip
def test_what_prepare_refuses_a_dry_run_refuses(monkeypatch, capsys, line):
    monkeypatch.setattr(preflight, "prepare", fails(line))
    assert main([*SWEEP, *DATA]) == 2
    shown = capsys.readouterr()
    assert shown.err == f"error: {line}\n" and shown.out.startswith("sweep ")


@pytest.mark.parametrize(
    ("given", "line", "part"),
    [
        (DATA, "model.path = 'org/model': offline", "template and samples: the hub did not deliver model.path = org/model"),
        (["data.train=org/data"], "data.train = 'org/data': gated", "deliver data.train = org/data now (gated)"),
    ],
)  # fmt: skip
def test_what_the_hub_does_not_deliver_is_named_and_the_plan_stays(monkeypatch, capsys, given, line, part):
    monkeypatch.setattr(preflight, "prepare", fails(line))
    monkeypatch.setattr(preflight, "inspect", fails(line) if "model" in line else lambda *_: Facts(shape=SHAPE))
    assert main([*SWEEP, *given, "cluster.card=l4"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("unchecked  ") == 1 and part in shown.out and shown.err == ""


def test_a_folder_that_is_here_is_no_hub_id(monkeypatch, place):
    (place / "org" / "model").mkdir(parents=True)
    monkeypatch.setattr(preflight, "prepare", fails("model.path = 'org/model': config.json is not in it"))
    assert main([*SWEEP, *DATA]) == 2


def test_any_other_failure_of_prepare_is_no_excuse(monkeypatch):
    monkeypatch.setattr(preflight, "prepare", fails("python -m engine prepare failed with exit code 1: killed", 1))
    assert main([*SWEEP, *DATA]) == 1


# --- too little data ---

CONFIG = parse_sweep_config({"model": {"path": "m"}, "data": {"train": "t"}, "train": {"max_tokens": 60_000}})


@pytest.mark.parametrize(
    ("found", "given", "parts"),
    [
        ({"num_train_tokens": 2_999, "num_train_samples": 60}, {}, ["60 training samples (2,999 tokens) 20 times"]),
        ({"num_train_tokens": 54, "num_train_samples": 60}, {}, ["1,111 times"]),
        ({"num_train_tokens": 3_000}, {}, []),
        ({"num_train_tokens": 0}, {}, []),
        ({"num_eval_samples": 3}, {}, ["3 evaluation samples decide"]),
        ({"num_eval_samples": 32}, {}, []),
        ({"num_eval_samples": 3, "num_train_tokens": 1}, {}, ["60,000 times", "3 evaluation samples"]),
    ],
)
def test_too_many_passes_and_too_few_evaluation_samples_are_warnings(found, given, parts):
    lines = list(data_warnings(CONFIG, prepared(**found), given))
    assert len(lines) == len(parts) and all(part in line for part, line in zip(parts, lines))


@pytest.mark.parametrize(
    ("num_tokens", "shown"),
    [(3_597, "60,000 tokens a trial = 17 passes over 3,597 tokens: about 1,001 samples"), (60_000, "= 1 pass over 60,000"),
     (240_000, "= 0.25 passes over 240,000 tokens: about 15 samples"), (54, "= 1,111 passes over 54")],
)  # fmt: skip
def test_the_plan_says_how_often_a_trial_reads_the_data(num_tokens, shown):
    assert shown in passes_line(CONFIG, prepared(num_train_tokens=num_tokens, num_train_samples=60))


def test_without_known_tokens_it_says_nothing():
    assert passes_line(CONFIG, prepared(num_train_tokens=0)) is None


def test_few_evaluation_samples_by_choice_of_an_experiment_are_none_but_by_choice_of_the_user_are():
    config = parse_sweep_config(compose(["+experiment=quickstart"]))
    assert list(data_warnings(config, prepared(num_eval_samples=16), {})) == []
    assert len(list(data_warnings(config, prepared(num_eval_samples=16), {"data.eval_max_samples": 16}))) == 1


def test_warnings_are_shown_in_the_plan(monkeypatch, capsys):
    monkeypatch.setattr(preflight, "prepare", lambda *_: prepared(num_eval_samples=3, num_train_tokens=5000))
    assert main([*SWEEP, *DATA]) == 0
    shown = capsys.readouterr()
    assert "WARNING: 3 evaluation samples" in shown.err and "WARNING: each trial reads the 1,000" in shown.err


def test_the_plan_counts_dimensions_in_the_singular_too():
    for space, shown in (([], "4 dimensions, continuous"), (["space=none"], "0 dimensions, 1 point"),
                         (["space=none", "space.lora.rank.choices=[4,8]"], "1 dimension, 2 points")):  # fmt: skip
        plan = make_sweep_plan(parse_sweep_config(compose(["+experiment=llama-3.2-1b-24gb", *space])))
        assert f"space      {shown}\n" in plan.describe() + "\n"


def test_the_plan_counts_the_tokens_that_a_budget_allows():
    for full_trials, shown in ((1, "4,000,000 in all; ends early at 4 GPU hours, the tokens of 1 full trial"),
                               (2.5, "10,000,000 in all; ends early at 4 GPU hours, the tokens of 2.5 full trials")):  # fmt: skip
        words = ["+experiment=llama-3.2-1b-24gb", "sampler=freeze_thaw", f"sweep.budget.full_trials={full_trials}"]
        text = make_sweep_plan(parse_sweep_config(compose(words))).describe()
        assert f"budget     4,000,000 tokens a trial, at most {shown}\n" in text


@pytest.mark.parametrize(
    ("words", "num_gpus", "warned"),
    [(["sampler=freeze_thaw"], 8, "8 slots share the tokens of 5.5 full trials, .* raise sweep.num_trials"),
     (["sampler=freeze_thaw", "sweep.budget.full_trials=1"], 2, "tokens of 1 full trial, .* raise sweep.budget.full_trials"),
     (["sampler=freeze_thaw"], 5, None), (["sampler=tpe"], 8, None)],
)  # fmt: skip
def test_slots_that_a_budget_of_tokens_leaves_idle_are_told(words, num_gpus, warned):
    config = parse_sweep_config(compose(["+experiment=llama-3.2-1b-24gb", "sweep.num_trials=22", *words]))
    lines = make_sweep_plan(config, lambda cluster: Hardware(num_gpus, 8)).warnings()
    assert lines == [] if warned is None else re.search(warned, lines[0])


# --- the most demanding point ---


def pinned(*words, predicts=True):
    plan = make_sweep_plan(parse_sweep_config(compose(["+experiment=quickstart", "+debug=one-trial", *words])))
    feasibility = Feasibility(SHAPE if predicts else None, CARDS["l4"] if predicts else None)
    return plan.pinned(most_demanding(plan.space, plan.base(), feasibility)).config


@pytest.mark.parametrize("predicts", [True, False])
def test_the_debug_trial_is_the_point_that_needs_most_memory(predicts):
    config = pinned(predicts=predicts)
    assert (config.lora.rank, config.lora.target_modules, config.data.max_seq_length) == (16, "all-linear", 256)
    assert config.space == {} and config.train.report_grid() == (2048, 4096)


def test_order_in_the_space_does_not_decide():
    config = pinned("space=none", "space.lora.rank.choices=[64,8]", "space.data.max_seq_length.choices=[512,128]")
    assert (config.lora.rank, config.data.max_seq_length) == (64, 512)


def test_rungs_of_the_debug_trial_move_apart_for_long_steps():
    config = pinned("space=none", "space.data.max_seq_length.choices=[512,8192]")
    assert config.data.max_seq_length == 8192 and config.train.report_grid() == (8192, 16_384)


def test_a_point_that_does_not_fit_is_not_the_one_to_try():
    space = parse_space({"data.max_seq_length": {"choices": [1024, 100_000_000]}})
    base = parse_sweep_config({"model": {"path": "m"}, "data": {"train": "t"}, "train": {"max_tokens": 10**10}}).base()
    params = most_demanding(space, base.model_dump(mode="json"), Feasibility(SHAPE, CARDS["l4"]))
    assert params == {"data.max_seq_length": 1024}


def test_a_new_sweep_whose_space_has_values_that_exclude_each_other_is_refused_and_an_older_one_goes_on():
    words = ["space.model.quantization.choices=[nf4,none]", "space.train.matmul.choices=[bf16,int8]"]
    config = parse_sweep_config(compose(["+experiment=llama-3.2-1b-24gb", *(f"++{word}" for word in words)]))
    with pytest.raises(InputError, match=r"^space\.train\.matmul = 'int8': not valid with model\.quantization = none"):
        make_sweep_plan(config, lambda cluster: Hardware(1, 8))
    assert make_sweep_plan(config, lambda cluster: Hardware(1, 8), is_new=False).space.dimensions


# --- a budget in passes ---


def dry_run(monkeypatch, num_tokens, *given):
    monkeypatch.setattr(preflight, "prepare", lambda *_: prepared(num_train_tokens=num_tokens))
    return main([*SWEEP, *DATA, "train.num_reports=3", "train.tokens_per_step=1024", "data.max_seq_length=1024", *given])


def test_passes_end_a_trial_before_its_tokens_do_and_rungs_and_forecast_follow(monkeypatch, capsys):
    assert dry_run(monkeypatch, 30_000, "train.max_epochs=2") == 0
    shown = capsys.readouterr().out
    assert "4,000,000 tokens a trial or 2 passes, whichever ends first" in shown
    assert "60,000 tokens a trial, by train.max_epochs = 2; rungs at tokens seen: 20,000, 40,000, 60,000" in shown
    assert "60,000 tokens a trial = 2 passes" in shown
    assert dry_run(monkeypatch, 30_000, "train.max_epochs=2", "train.max_tokens=50_000") == 0
    assert "50,000 tokens a trial, which end before train.max_epochs = 2" in capsys.readouterr().out


def test_passes_too_short_for_the_rungs_are_one_line(monkeypatch, capsys):
    assert dry_run(monkeypatch, 2_000, "train.max_epochs=1") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: train.max_epochs = 1.0: gives 2,000 tokens a trial, at 2,000 a pass, and train.num_reports")
    assert error.count("\n") == 1


def test_a_sweep_in_passes_starts_warm_from_one_like_it(monkeypatch, capsys, tmp_path):
    given = ["train.max_epochs=2", "train.num_reports=3", "train.tokens_per_step=1024", "data.max_seq_length=1024"]
    earlier = parse_sweep_config(compose([*SWEEP[:-1], f"data.train={tmp_path}/t.jsonl", "sampler=random", *given]))
    earlier = with_absolute_paths(earlier, tmp_path)
    earlier = earlier.model_copy(update={"train": earlier.train.within_epochs(30_000)})
    (path := tmp_path / "earlier").mkdir()
    SweepFolder(path).write_config(earlier)
    study = study_in(path, earlier)
    number, reports = study.ask().number, [report(rung, 2.0 - rung / 10) for rung in (1, 2, 3)]
    for one in reports:
        study.report(number, one.rung, one.eval_loss)
    write_reports(path, number, reports)
    study.tell(number, Outcome.COMPLETE)
    warm = ["train.max_epochs=2", f"sweep.warm_start=[{path}]"]
    assert dry_run(monkeypatch, 30_000, *warm) == 0
    assert f"warm start 1 trial from {path}" in capsys.readouterr().out
    assert dry_run(monkeypatch, 40_000, *warm) == 2
    assert "train.max_tokens is 60000 there and 80000 here" in capsys.readouterr().err
