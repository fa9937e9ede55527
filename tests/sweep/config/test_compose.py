"""Options compose into a config, errors are one line, and layers hold, before anything starts."""

from __future__ import annotations

from datetime import datetime

import pytest

from engine.errors import InputError
from sweep import preflight
from sweep.__main__ import compose, groups, main
from sweep.cluster.slots import Slots, plan_slots
from sweep.config.sweep import ClusterConfig, parse_sweep_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.plan.sweep_plan import make_sweep_plan
from sweep.space.parse import parse_space
from tests.support.prepared import prepared

ONE_RUNG = ("extraction", "forgetting", "preferences")  # experiments for two CPU cores that judge finished trials only
NEEDED = ["model=smollm2-135m", "data=stdlib-docs"]
OPTIONS = [(group, option) for group, options in groups().items() for option in options]


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{group}={option}" for group, option in OPTIONS])
def test_every_option_composes_into_a_plan(group, option):
    extra = {
        "model=local": ["model.path=m"], "data=local": ["data.train=t.jsonl"],
        "space=what-it-learns-from": ["data.train=[{path: a.jsonl}, {path: b.jsonl}]"],
    }.get(f"{group}={option}", [])  # fmt: skip
    if (group, option) == ("sampler", "grid"):
        extra = ["space=none"]
    needed = NEEDED[:1] if option == "preferences" else NEEDED  # its objective needs its own pairs of answers
    config = parse_sweep_config(compose([*needed, f"{group}={option}", *extra]))
    if group != "cluster":
        assert make_sweep_plan(config).num_rungs >= (1 if group == "debug" or option in ONE_RUNG else 3)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["model=llama"], ["model = 'llama'", "llama-3.1-8b"]),
        ([], ["data.train", "required"]),
        ([*NEEDED, "optim.learing_rate=1"], ["optim.learing_rate", "did you mean 'learning_rate'"]),
        ([*NEEDED, "modle.path=1"], ["modle.path", "did you mean 'model'"]),
        (["+experiment=quikstart"], ["experiment = 'quikstart'", "did you mean 'quickstart'"]),
        ([*NEEDED, "train.max_tokens=1e6"], ["train.max_tokens = 1000000.0", "valid integer: write 1000000"]),
        ([*NEEDED, "lora.rank=eight"], ["lora.rank", "'eight'", "integer"]),
        ([*NEEDED, "lora.rank=["], ["lora.rank=["]),
        ([*NEEDED, "sampler.name=annealing"], ["sampler.name", "tpe"]),
        ([*NEEDED, "pruner.factor=3"], ["pruner.factor", "reduction_factor"]),
        ([*NEEDED, "cluster.num_gpus=99"], ["cluster.num_gpus", "GPUs found"]),
        ([*NEEDED, "cluster.num_gpus=some"], ["cluster.num_gpus", "auto"]),
        ([*NEEDED, "cluster.card=rtx4900"], ["cluster.card", "rtx4900", "auto", "a10g", "did you mean 'rtx4090'"]),
        ([*NEEDED, "sampler=grid"], ["sampler.name", "optim.learning_rate"]),
        ([*NEEDED, "sweep.name=a/b"], ["sweep.name", "a/b"]),
        ([*NEEDED, "train.report_at_tokens=[200,100]"], ["train.report_at_tokens = [200, 100]: must ascend"]),
        ([*NEEDED, "train.max_tokens=9", "train.num_reports=10"], ["train.num_reports = 10: must not exceed max_tokens = 9"]),
        ([*NEEDED, "lora.target_modules="], ["lora.target_modules = '': must name at least one"]),
        ([*NEEDED, "train.cuda_graphs=true", "train.host_layers=2"], ["train.cuda_graphs = True", "train.host_layers = 0"]),
        ([*NEEDED, "optim.beta1=0.8,0.9"], ["optim.beta1 = '0.8,0.9'", "space.optim.beta1.choices=[0.8,0.9]"]),
        ([*NEEDED, "sweep.objectives=a,b"], ["sweep.objectives = 'a,b'", "a list is written sweep.objectives=[a,b]"]),
        ([*NEEDED, "~space.lora.rnk"], ["'~space.lora.rnk'", "space.lora.rank", "did you mean 'space.lora.rank'"]),
        ([*NEEDED, "sweep.name=a-${train.sed}"], ["sweep.name = 'a-${train.sed}'", "'train.sed' not found"]),
        ([*NEEDED, "sweep.first_trials={lora.rank: 8}"], ["sweep.first_trials = ", "must be a list: [{lora.rank: 8}]"]),
        ([*NEEDED, "sweep.budget=[1]"], ["sweep.budget = '[1]'", "must be a section"]),
        ([*NEEDED, "sweep.budget.full_trials=0.01"], ["sweep.budget.full_trials = 0.01", "must be at least 0."]),
        (["quickstart"], ["argument", "group=option"]),
        (["resume=nowhere"], ["resume", "sweep folder"]),
        (["resume=nowhere", "--cfg"], ["--cfg", "sweep_config.json"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(part in error for part in parts), error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("group", ["pruner", "sampler", "tracking", "cluster", "model"])
def test_an_experiment_goes_with_every_option_of_the_other_groups(group):
    for option in groups()[group]:
        raw = compose(["+experiment=quickstart", f"{group}={option}", "model.path=m"])
        assert parse_sweep_config(raw).sweep.name == "quickstart"


def test_a_leaf_of_the_space_can_be_replaced_by_another_kind():
    leaf = "space.lora.rank={low: 4, high: 64, log: true}"
    with pytest.raises(InputError, match="remove it first: '~space.lora.rank'"):
        parse_space(compose(["+experiment=quickstart", leaf])["space"])
    space = parse_space(compose(["+experiment=quickstart", "~space.lora.rank", leaf])["space"])
    assert "lora.rank" in {dimension.path for dimension in space.dimensions}


def test_a_dry_run_prints_the_plan_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "prepare", lambda configs, module: prepared())
    assert main(["+experiment=quickstart", "dry_run=true"]) == 0
    text = capsys.readouterr().out
    for part in ("8 trials", "1,024, 2,048, 4,096", "successive_halving", "lora.rank", "4, 8, 16"):
        assert part in text
    assert list(tmp_path.iterdir()) == []


def test_resume_takes_no_override_but_more_trials(tmp_path, capsys):
    config = parse_sweep_config(compose([*NEEDED, f"sweep.output_dir={tmp_path}"]))
    folder = SweepFolder.create(config, datetime(2025, 1, 1))
    for override, part in (("lora.rank=8", "cannot be changed on resume"), ("sweep.num_trials=2", "at least 16")):
        assert main([f"resume={folder.path}", override]) == 2
        assert part in capsys.readouterr().err


def test_a_second_driver_on_one_folder_is_refused(tmp_path):
    folder = SweepFolder(tmp_path)
    with folder.lock(), pytest.raises(InputError, match="another driver"), folder.lock():
        pass
    with folder.lock():
        pass


def test_slots_are_gpus_where_there_are_any_and_core_shares_elsewhere():
    assert plan_slots(ClusterConfig(), "auto", 2, 16) == Slots(2, "cuda", 1)
    assert plan_slots(ClusterConfig(cpus_per_trial=2), "auto", 0, 4) == Slots(2, "cpu", 2)
    assert plan_slots(ClusterConfig(max_concurrent=1), "cpu", 2, 4) == Slots(1, "cpu", 1)
    with pytest.raises(InputError, match=r"train\.device"):
        plan_slots(ClusterConfig(), "cuda", 0, 4)
