"""A bad config gives one line that names the field, its value and what is allowed."""

import json

import pytest

from engine.config.parsing import parse, to_json
from engine.config.trial import TrainConfig
from engine.errors import InputError

GOOD = {"model": {"path": "m"}, "data": {"train": "d"}, "train": {"max_tokens": 100}}


def config(**sections):
    return parse(TrainConfig, {**GOOD, **sections})


@pytest.mark.parametrize(
    ("sections", "field", "allowed"),
    [
        ({"lora": {"rank": 0}}, "lora.rank", "greater than or equal to 1"),
        ({"lora": {"rank": "8"}}, "lora.rank", "valid integer"),
        ({"lora": {"rnk": 8}}, "lora.rnk", "known keys: alpha_pattern, lora_alpha, lora_dropout, rank.*did you mean 'rank'"),
        ({"lora": {"target_modules": []}}, "lora.target_modules", "at least one module"),
        ({"lora": {"target_modules": ["q_proj", 3]}}, "lora.target_modules.1", "must be text"),
        ({"lora": {"target_modules": 3}}, "lora.target_modules", r"must be text or a list: \[3\]$"),
        ({"lora": {"rank_pattern": {"up_proj": 0}}}, "lora.rank_pattern.up_proj", "greater than or equal to 1"),
        ({"lora": {"rank_pattern": 4}}, "lora.rank_pattern", "must be a section: {key: value}$"),
        ({"lora": {"use_dora": "x"}}, "lora.use_dora", "must be true or false$"),
        ({"model": {"path": "m", "train_tokens": "<tool>"}}, "model.train_tokens", r"must be a list: \[<tool>\]$"),
        ({"model": {"path": "m", "train_tokens": None}}, "model.train_tokens", "must be a list$"),
        ({"metrics": {"exact_match": ""}}, "metrics.exact_match", "must be true or false or text that is not empty$"),
        ({"metrics": {"choices": ["a"]}}, "metrics.choices", "must be text or a list of at least 2$"),
        ({"metrics": {"my-score": "a:b"}}, "metrics.my-score", "must have a name of its own"),
        ({"metrics": {"mine": "a:"}}, "metrics.mine", "must be package.module:function$"),
        ({"metrics": {"mine": {"function": "a:b", "direction": "up"}}}, "metrics.mine.direction", "'maximize' or 'minimize'$"),
        ({"data": {"train": "d", "eval": {}}}, "data.eval", "must hold from 1 to 16 evaluation sets$"),
        ({"data": {"train": "d", "eval": {"a": None}, "eval_weights": {"a": -1}}}, "data.eval_weights.a", "equal to 0$"),
        ({"data": {"train": "d", "eval": {"a": None}, "eval_limits": {"a": {}}}}, "data.eval_limits.a", "must give above_base"),
        ({"train": {"max_tokens": 9, "report_at_tokens": [4, "x"]}}, "train.report_at_tokens.1", "valid integer"),
        ({"lora": {"lora_dropout": 1.0}}, "lora.lora_dropout", "less than 1"),
        ({"optim": {"learning_rate": float("nan")}}, "optim.learning_rate", "finite"),
        ({"data": {"train": "d", "format": "chatty"}}, "data.format", "'messages'"),
        ({"train": {}}, "train.max_tokens", "missing"),
        ({"train": {"max_tokens": 10, "report_at_tokens": [5, 5]}}, "train.report_at_tokens", "ascend"),
        ({"train": {"max_tokens": 9, "micro_batch_size": 0}}, "train.micro_batch_size", "or equal to 1 or 'auto'$"),
        ({"train": {"max_tokens": 9, "activation_checkpointing": "x"}}, "train.activation_checkpointing", "or .*'offload'$"),
        ({"extra": 1}, "extra", "unknown key; known keys: data, lora, metrics, model, optim, preference, train"),
        ({"a\n\x1b[2Jb": 1}, "a\n\x1b[2Jb", r"^a\\n\\x1b\[2Jb = 1: unknown key"),
    ],
)
def test_a_bad_value_is_one_line_with_field_value_and_what_is_allowed(sections, field, allowed):
    with pytest.raises(InputError, match=allowed) as caught:
        config(**sections)
    assert caught.value.field == field
    assert str(caught.value).isprintable()


def test_a_trial_without_an_average_has_the_fingerprint_of_older_versions():
    older = "11ad88c6ccd9f221"  # before optim.ema_horizon was there
    assert config(train={"max_tokens": 1000}).fingerprint() == older
    assert config(train={"max_tokens": 1000}, optim={"ema_horizon": 0.1}).fingerprint() != older
    assert config(train={"max_tokens": 1000}, optim={"loraplus_lr_ratio": 16.0}).fingerprint() != older


def test_json_round_trips_and_the_fingerprint_tells_configs_apart():
    one = config(lora={"rank": 8, "target_modules": ["q_proj"]})
    assert parse(TrainConfig, json.loads(to_json(one))) == one
    assert config(lora={"target_modules": ["q_proj"], "rank": 8}).fingerprint() == one.fingerprint()
    assert config(lora={"rank": 16, "target_modules": ["q_proj"]}).fingerprint() != one.fingerprint()


@pytest.mark.parametrize(("name", "written"), [("keep", False), ("recompute", True), (False, False), ("offload", "offload")])
def test_a_policy_may_be_named_and_is_written_as_it_always_was(name, written):
    loop = config(train={"max_tokens": 100, "activation_checkpointing": name}).train
    assert loop.activation_checkpointing is written
    assert json.loads(to_json(loop))["activation_checkpointing"] is written or written == "offload"


def test_the_report_grid_ends_at_max_tokens():
    assert config(train={"max_tokens": 100, "num_reports": 4}).train.report_grid() == (25, 50, 75, 100)
    assert config(train={"max_tokens": 100, "report_at_tokens": [10, 30]}).train.report_grid() == (10, 30, 100)


def test_tokens_per_step_gives_every_length_the_same_step():
    for length in (128, 256, 512):
        trial = config(data={"train": "d", "max_seq_length": length}, train={"max_tokens": 100, "tokens_per_step": 1024})
        assert trial.bins_per_step * length == 1024


def test_the_fingerprint_is_that_of_the_mathematics():
    def fingerprint(length=256, **train):
        values = {"max_tokens": 1000, "tokens_per_step": 1024, **train}
        return config(data={"train": "d", "max_seq_length": length}, train=values).fingerprint()

    first = fingerprint()
    for change in (
        {"micro_batch_size": 2}, {"activation_checkpointing": "offload"}, {"keep_layers": 3}, {"weight_cache_gib": 2.0},
        {"memory_budget_gib": 20.0}, {"tokens_per_step": None, "micro_batch_size": 2, "gradient_accumulation_steps": 2},
    ):  # fmt: skip
        assert fingerprint(**change) == first, change
    for change in ({"tokens_per_step": 2048}, {"seed": 1}, {"length": 512}, {"micro_batch_size": 2, "tokens_per_step": None}):
        assert fingerprint(**change) != first, change


def test_alpha_defaults_to_twice_the_rank_and_rslora_scales_by_its_root():
    assert config(lora={"rank": 16}).lora.scaling == 2.0
    assert config(lora={"rank": 16, "lora_alpha": 16, "use_rslora": True}).lora.scaling == 4.0
