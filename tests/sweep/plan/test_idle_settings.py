"""A setting that another one switches off is refused or named, and nothing else is."""

from __future__ import annotations

import pytest

from engine.errors import InputError
from sweep.__main__ import compose, groups
from sweep.config.compose import given_keys
from sweep.config.resume_changes import AMENDABLE
from sweep.config.sweep import parse_sweep_config
from sweep.plan.idle_settings import RULES, idle_settings, refuse_idle_overrides
from sweep.space.parse import known_paths, parse_space

QUICK = ["+experiment=quickstart"]
IDLE = {  # what is given -> both names
    "lora.rank=8": ["lora.rank = 8", "space.lora.rank", "'~space.lora.rank'"],
    "lora={rank: 8}": ["lora.rank = 8", "space.lora.rank"],
    "optim.learning_rate=1e-4": ["optim.learning_rate", "space.optim.learning_rate varies it"],
    "train.num_reports=4": ["train.num_reports = 4", "train.report_at_tokens"],
    "train.gradient_accumulation_steps=4": ["train.gradient_accumulation_steps = 4", "train.tokens_per_step"],
    "data.eval_fraction=0.5": ["data.eval_fraction", "data.train = builtin:stdlib-docs"],
    "data.eval_fraction=0.1 data.eval=x.jsonl": ["data.eval_fraction", "data.eval is given"],
    "data.eval_split=test": ["data.eval_split", "data.eval is not given"],
    "data.eval_split=test data.eval=x.jsonl": ["data.eval_split", "data.eval is no folder and not on the hub"],
    "data.eval_split=test data.eval=train": ["data.eval_split", "data.eval = train"],
    "data.train_split=test data.train=x.jsonl": ["data.train_split", "data.train is no folder and not on the hub"],
    "data.train_split=test data.train=[x.jsonl,y.jsonl]": ["data.train_split", "data.train is no folder and not on the hub"],
    "data.train_revision=abc data.train=*.jsonl": ["data.train_revision", "data.train is not on the hub"],
    "data.eval_fraction=0.1 data.eval=[x.jsonl,y.jsonl]": ["data.eval_fraction", "data.eval is given"],
    "data.eval_name=b": ["data.eval_name", "data.eval is not given"],
    "data.eval_files=[b.csv] data.eval=train": ["data.eval_files", "data.eval = train"],
    "data.eval_revision=abc data.eval=builtin:stdlib-docs": ["data.eval_revision", "data.eval is not on the hub"],
    "data.turns=last data.format=text": ["data.turns", "data.format = text"],
    "data.template_kwargs.a=1 data.format=text": ["data.template_kwargs", "data.format = text"],
    "data.chat_template=chatml data.format=text": ["data.chat_template", "data.format = text"],
    "model.revision=abc": ["model.revision", "model.path"],
    "model.double_quantization=true model.quantization=none": ["model.double_quantization", "model.quantization = none"],
    "optim.min_lr_ratio=0.1 optim.lr_schedule=constant": ["optim.min_lr_ratio", "optim.lr_schedule = constant"],
    "optim.decay_ratio=0.3": ["optim.decay_ratio", "no trial has optim.lr_schedule = wsd"],
    "optim.eps=1e-6 optim.name=lion": ["optim.eps", "Lion has no eps"],
    "optim.beta2=0.9 optim.name=muon": ["optim.beta2", "Muon has beta1 alone"],
    "metrics.max_samples=9": ["metrics.max_samples", "no metric is named"],
    "metrics.max_new_tokens=9 metrics.choice_accuracy=true metrics.choices=[a,b]": ["metrics.max_new_tokens", "generates"],
    "metrics.function_timeout_s=9 metrics.exact_match=true": ["metrics.function_timeout_s", "function of yours"],
    "space.optim.min_lr_ratio.choices=[0,0.1] optim.lr_schedule=constant": ["space.optim.min_lr_ratio", "constant"],
    "sweep.prior=true sampler=grid": ["sweep.prior = True", "sampler.name = grid"],
    "cluster.wait_s=60": ["cluster.wait_s", "cluster.address is not given"],
    "cluster.wait_s=60 cluster.address=auto": ["cluster.wait_s", "cluster.num_gpus = auto"],
    "cluster.num_gpus=0 train.device=cpu": ["cluster.num_gpus", "train.device = cpu"],
    "cluster.num_cpu_slots=2 train.device=cuda": ["cluster.num_cpu_slots", "train.device = cuda"],
    "train.memory_budget_gib=20 train.device=cpu": ["train.memory_budget_gib", "train.device = cpu"],
    "tracking.uri=x tracking=none": ["tracking.uri", "tracking.name = none"],
    "tracking.registered_model=x tracking=none": ["tracking.registered_model", "tracking.name = none"],
    "tracking.metrics_host=0.0.0.0": ["tracking.metrics_host", "tracking.metrics_port is not given"],
    "pruner.reduction_factor=3 sweep.objectives=[eval_loss,elapsed_s]": ["pruner.reduction_factor", "sweep.objectives"],
    "pruner.reduction_factor=3 sampler=freeze_thaw": ["pruner.reduction_factor", "sampler=freeze_thaw", "sampler=tpe"],
    "pruner=median sampler=freeze_thaw": ["pruner.name = 'median'", "sampler=freeze_thaw", "sampler=tpe"],
    "pruner=successive_halving_late sampler=freeze_thaw": ["pruner.name = 'successive_halving_late'", "sampler=freeze_thaw"],
    "pruner=median sweep.objectives=[eval_loss,elapsed_s]": ["pruner.name = 'median'", "sweep.objectives"],
}


def judged(words):
    raw, given = compose(words), given_keys(words)
    config = parse_sweep_config(raw)
    space = parse_space(config.space)
    refuse_idle_overrides(config, space, given)
    return list(idle_settings(config, space, given))


@pytest.mark.parametrize("typed", IDLE)
def test_an_override_without_effect_is_refused_with_both_names(typed):
    with pytest.raises(InputError, match="has no effect") as error:
        judged([*QUICK, *typed.split(" ")] if "{" not in typed else [*QUICK, typed])
    assert all(part in str(error.value) for part in IDLE[typed]), str(error.value)


@pytest.mark.parametrize(
    "typed",
    ["lora.rank=8 ~space.lora.rank", "lora.lora_alpha=8", "train.num_reports=4 train.report_at_tokens=null",
     "data.eval=x.jsonl", "train.gradient_accumulation_steps=4 train.tokens_per_step=null",
     "tracking.uri=null tracking=none", "cluster.card=l4", "data.eval_fraction=0.5 data.train=x.jsonl",
     "data.eval_fraction=0.5 data.train=[x.jsonl,y.jsonl]", 
     "data.train_split=test data.train=tests", "data.eval_name=b data.eval=tests",
     "data.train_split=test data.train=org/name", "model.revision=abc model.path=org/name", "optim.min_lr_ratio=0.1",
     "optim.min_lr_ratio=0.1 space.optim.lr_schedule.choices=[constant,linear]", "optim.warmup_ratio=0.1",
     "cluster.wait_s=60 cluster.address=auto cluster.num_gpus=2", "tracking.metrics_host=0.0.0.0 tracking.metrics_port=0",
     "space.lora.lora_alpha.choices=[8,16]", "model.double_quantization=false", "pruner.reduction_factor=3",
     "pruner=median sampler=tpe", "pruner=none sampler=freeze_thaw", "pruner=none sweep.objectives=[eval_loss,elapsed_s]"],
)  # fmt: skip
def test_the_same_setting_is_taken_where_it_has_an_effect(typed):
    assert judged([*QUICK, *typed.split(" ")]) == []


def test_a_setting_that_holds_where_a_condition_fails_has_an_effect():
    space = ["space=none", "space.lora.use_rslora.choices=[true,false]",
             "space.lora.rank={choices: [2, 4], when: {lora.use_rslora: true}}"]  # fmt: skip
    assert judged([*QUICK, *space, "lora.rank=8"]) == []


@pytest.mark.parametrize("experiment", groups()["experiment"])
def test_committed_sweeps_warn_of_nothing(experiment):
    for debug in ([], *([f"+debug={name}"] for name in groups()["debug"])):
        assert judged([f"+experiment={experiment}", *debug]) == []
    assert judged(["data.train=t.jsonl"]) == []


@pytest.mark.parametrize("experiment", groups()["experiment"])
def test_a_pruner_that_is_off_brings_no_warning_of_options_that_nobody_set(experiment):
    """The plan says that it is off."""
    assert judged([f"+experiment={experiment}", "sampler=tpe", "sweep.objectives=[eval_loss,num_trainable]"]) == []
    if experiment in ("extraction", "forgetting", "preferences"):  # a metric decides, or limits do
        with pytest.raises(InputError, match="sampler.name = 'freeze_thaw'"):
            judged([f"+experiment={experiment}", "sampler=freeze_thaw"])
    else:
        assert judged([f"+experiment={experiment}", "sampler=freeze_thaw"]) == []


def test_a_file_of_conf_gives_a_warning_that_names_both(monkeypatch):
    raw = compose(QUICK)
    for section, field, value, other in (
        ("lora", "rank", 32, "space.lora.rank"), ("train", "num_reports", 5, "train.report_at_tokens"),
        ("data", "eval_split", "test", "data.eval"), ("tracking", "metrics_host", "0.0.0.0", "tracking.metrics_port"),
    ):  # fmt: skip
        config = parse_sweep_config({**raw, section: {**raw[section], field: value}})
        (line,) = idle_settings(config, parse_space(config.space), {})
        assert line.startswith(f"{section}.{field} = {value} has no effect") and other in line


def test_every_rule_names_a_field():
    from sweep.cli.config_keys import keys, sections

    known = {key.path for section in sections() for key in keys(section)} | set(known_paths())
    assert set(RULES) <= known and "sweep.num_trials" in AMENDABLE
