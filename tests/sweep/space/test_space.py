"""The search space accepts valid settings, refuses others, and turns proposals into configs."""

from __future__ import annotations

import pytest

from engine.config.trial import LoopConfig, ModelConfig, TrainConfig
from engine.errors import InputError
from sweep.space.parse import parse_space

BASE = TrainConfig(model=ModelConfig(path="m"), data={"train": "t"}, train=LoopConfig(max_tokens=100)).model_dump(mode="json")
TARGETS = {"choices": {"attention": ["q_proj", "v_proj"], "all": "all-linear"}}


def error_of(space: dict) -> str:
    with pytest.raises(InputError) as caught:
        parse_space(space).single_changes(BASE)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nested_and_dotted_keys_mean_the_same():
    assert parse_space({"lora": {"rank": {"choices": [4, 8]}}}) == parse_space({"lora.rank": {"choices": [4, 8]}})


def test_a_named_choice_puts_its_value_into_the_config():
    space = parse_space({"lora.target_modules": TARGETS})
    assert space.apply(BASE, {"lora.target_modules": "attention"}).lora.target_modules == ("q_proj", "v_proj")
    assert space.apply(BASE, {"lora.target_modules": "all"}).lora.target_modules == "all-linear"


def test_a_record_s_plain_config_is_that_of_the_checked_one_and_shares_what_the_space_leaves_alone():
    space = parse_space({"lora.target_modules": TARGETS, "optim.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}})
    params = {"lora.target_modules": "attention", "optim.learning_rate": 3e-4}
    plain = space.merged(BASE, params)
    assert plain == space.apply(BASE, params).model_dump(mode="json") != BASE
    assert all((plain[name] is BASE[name]) == (name not in ("lora", "optim")) for name in BASE)


def test_a_space_may_vary_how_the_base_multiplies_because_every_evaluation_is_alike():
    space = parse_space({"train.matmul": {"choices": ["bf16", "int8"]}})
    assert [space.apply(BASE, {"train.matmul": name}).matmul for name in ("bf16", "int8")] == ["bf16", "int8"]
    not_packed = {"train.matmul": {"choices": ["int8"]}, "model.quantization": {"choices": ["none"]}}
    assert "INT8 codes are made of NF4 weights" in error_of(not_packed)


def test_values_that_are_valid_alone_and_not_together_are_refused_before_a_sampler_draws_both():
    quantization, matmul = {"choices": ["nf4", "none"]}, {"choices": ["bf16", "int8"]}
    space = parse_space({"model.quantization": quantization, "train.matmul": matmul})
    space.single_changes(BASE)
    with pytest.raises(InputError, match=r"space\.train\.matmul = 'int8': not valid with model\.quantization = none: .*`when`"):
        space.check_pairs(BASE)
    held = {**matmul, "when": {"model.quantization": "nf4"}}
    parse_space({"model.quantization": quantization, "train.matmul": held}).check_pairs(BASE)
    parse_space({"lora.rank": {"low": 4, "high": 64}, "train.matmul": matmul}).check_pairs(BASE)


def test_values_that_only_the_model_can_rule_out_together_are_among_the_configs_that_it_checks():
    dora, targets = {"choices": [False, True]}, {"choices": {"all": "all-linear", "experts": ["experts"]}}
    tying, tied = ("lora.target_modules",), ("lora.use_dora",)
    for first in (True, False):  # in either order, and only where a trial can have both
        parts = [("lora.target_modules", targets), ("lora.use_dora", dora), ("lora.rank", {"choices": [8, 16]})]
        found = parse_space(dict(parts if first else parts[::-1])).pair_changes(BASE, tying, tied)
        assert {(one.lora.target_modules, one.lora.use_dora) for one in found} >= {(("experts",), True), ("all-linear", True)}
        assert {one.lora.rank for one in found} == {16}
    held = {**dora, "when": {"lora.target_modules": "all"}}
    space = parse_space({"lora.target_modules": targets, "lora.use_dora": held})
    found = space.pair_changes(BASE, tying, tied)
    assert not any(one.lora.use_dora and one.lora.target_modules == ("experts",) for one in found)


def test_whole_number_bounds_give_whole_numbers():
    leaves = {"lora.rank": {"low": 4, "high": 64, "log": True}, "lora.lora_dropout": {"low": 0.0, "high": 0.2, "step": 0.1}}
    rank, dropout = parse_space(leaves).dimensions
    assert rank.is_int and not dropout.is_int
    assert dropout.points() == [0.0, 0.1, 0.2]


def test_a_condition_switches_a_dimension_off_and_the_base_value_stays():
    rank = {"choices": [4, 8], "when": {"lora.target_modules": "all"}}
    space = parse_space({"lora.rank": rank, "lora.target_modules": TARGETS})
    assert [d.path for d in space.dimensions] == ["lora.target_modules", "lora.rank"]
    assert space.size() == 3
    assert len(list(space.points())) == 3
    assert space.apply(BASE, {"lora.target_modules": "attention"}).lora.rank == 16


def test_a_continuous_range_has_no_size():
    assert parse_space({"optim.learning_rate": {"low": 1e-4, "high": 1e-2}}).size() is None


def test_an_empty_space_has_one_point():
    assert parse_space({}).size() == 1


def test_a_mistyped_path_is_answered_with_near_ones():
    assert "did you mean 'lora.rank'" in error_of({"lora.rnk": {"choices": [4]}})


@pytest.mark.parametrize("path", ["data.train", "data.eval_max_seq_length", "train.max_tokens", "train.report_at_tokens"])
def test_what_would_make_trials_incomparable_is_refused_with_the_reason(path):
    assert "losses do not compare" in error_of({path: {"choices": ["a", "b"]}})


@pytest.mark.parametrize(
    ("leaf", "part"),
    [
        ({"choices": [0, 4]}, "greater than or equal to 1"),
        ({"choices": []}, "at least one"),
        ({"choices": [4, 4]}, "distinct"),
        ({"choices": [[4]]}, "need names"),
        ({"choices": [4], "low": 1}, "cannot be combined with low"),
        ({"low": 8}, "finite number"),
        ({"low": 8, "high": 4}, "must not be above"),
        ({"low": 0, "high": 4, "log": True}, "low above 0"),
        ({"low": 1, "high": 4, "step": 0.5}, "whole number"),
        ({"low": 1.5, "high": 4.0}, "valid integer"),
        ({"low": 1, "high": 4, "lg": True}, "known keys"),
        ({"choices": [4], "when": {"lora.lora_dropout": 0.1}}, "must refer to a field with choices"),
    ],
)
def test_a_wrong_leaf_is_one_line_that_says_what_is_allowed(leaf, part):
    assert part in error_of({"lora.rank": leaf})


def test_a_field_that_is_given_twice_nested_and_dotted_is_refused_rather_than_one_of_them_dropped():
    ranks, rslora = {"choices": [4]}, {"choices": [True, False]}
    assert "is given twice" in error_of({"lora.rank": ranks, "lora": {"rank": {"choices": [8]}}})
    when = {"lora.use_rslora": True, "lora": {"use_rslora": False}}
    assert "gives a field twice" in error_of({"lora.use_rslora": rslora, "lora.rank": {**ranks, "when": when}})


def test_conditions_in_a_circle_are_refused():
    circle = {
        "lora.rank": {"choices": [4], "when": {"lora.target_modules": "all"}},
        "lora.target_modules": {**TARGETS, "when": {"lora.rank": 4}},
    }
    assert "circle" in error_of(circle)


def test_variables_of_the_chat_template_can_be_searched():
    choices = {"off": {"enable_thinking": False}, "on": {"enable_thinking": True}}
    space = parse_space({"data.template_kwargs": {"choices": choices}})
    base = {"model": {"path": "m"}, "data": {"train": "t"}, "train": {"max_tokens": 100}}
    found = [space.apply(base, {"data.template_kwargs": name}) for name in choices]
    assert [config.data.template_kwargs for config in found] == list(choices.values())
    assert found[0].fingerprint() != found[1].fingerprint()
