"""A point of sweep.first_trials is read by name or value, and one that no trial can have is one line."""

from __future__ import annotations

import pytest

from engine.errors import InputError
from sweep.config.sweep import parse_sweep_config
from sweep.plan.sweep_plan import make_sweep_plan
from sweep.prior.beginning import make_beginning
from sweep.space.parse import parse_space
from tests.support.studies import config_for

SPACE = {
    "lora.target_modules": {"choices": {"attention": ["q_proj", "v_proj"], "everything": "all-linear"}},
    "lora.rank": {"choices": [8, 16, 32]},
    "lora.use_rslora": {"choices": [True, False], "when": {"lora.target_modules": "everything"}},
    "lora.lora_dropout": {"low": 0.0, "high": 0.2, "step": 0.1, "when": {"lora.target_modules": "attention"}},
    "optim.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
}


def own(*points, space=SPACE, **options):
    config = config_for(space, first_trials=list(points), **options)
    return list(make_beginning(config, parse_space(config.space), None).own)


def test_fields_are_given_nested_or_dotted_by_name_or_by_value():
    whole = {"lora.target_modules": "attention", "lora.rank": 8, "lora.lora_dropout": 0.1, "optim.learning_rate": 1e-3}
    nested = {"lora": {"target_modules": ["q_proj", "v_proj"], "rank": 8, "lora_dropout": 0.1}, "optim": {"learning_rate": 1e-3}}
    assert own(whole) == [whole] and own(nested) == [whole]
    assert own({"lora.target_modules": "all-linear"})[0]["lora.target_modules"] == "everything"


def test_what_a_point_lacks_is_the_base_config_s_value_or_the_nearest_that_the_space_has():
    """The base has all-linear, rank 16, no rsLoRA and a rate of 2e-4."""
    assert own({}) == [
        {"lora.target_modules": "everything", "lora.rank": 16, "lora.use_rslora": False, "optim.learning_rate": 2e-4}
    ]
    space = {"lora.rank": {"choices": [4, 32]}, "optim.learning_rate": {"low": 1e-3, "high": 1e-2, "log": True}}
    assert own({}, space=space) == [{"lora.rank": 32, "optim.learning_rate": 1e-3}]


def test_a_given_field_decides_the_choice_that_it_depends_on():
    point = own({"lora.lora_dropout": 0.2})[0]
    assert point["lora.target_modules"] == "attention" and "lora.use_rslora" not in point


def test_two_given_fields_decide_the_choice_with_which_both_vary():
    parent = {"choices": {"q": ["q_proj"], "v": ["v_proj"], "everything": "all-linear"}}
    space = {
        "lora.target_modules": parent,
        "lora.use_rslora": {"choices": [True, False], "when": {"lora.target_modules": ["everything", "v"]}},
        "lora.lora_dropout": {"choices": [0.0, 0.1], "when": {"lora.target_modules": ["q", "v"]}},
    }
    point = {"lora.use_rslora": True, "lora.lora_dropout": 0.1}
    assert own(point, space=space) == [{"lora.target_modules": "v", **point}]


@pytest.mark.parametrize(
    ("points", "line"),
    [
        ([{"lora.rnk": 8}], "point 1: lora.rnk is not varied; the space varies lora.target_modules, lora.rank, "
         "optim.learning_rate, lora.use_rslora, lora.lora_dropout; did you mean 'lora.rank'?"),
        ([{}, {"optim.weight_decay": 0.1}], "point 2: optim.weight_decay is not varied; the space varies "),
        ([{"lora.rank": 12}], "point 1: lora.rank = 12 is outside the space: 8, 16, 32"),
        ([{"lora.rank": "8"}], "point 1: lora.rank = '8' is outside the space"),
        ([{"lora.use_rslora": 1}], "point 1: lora.use_rslora = 1 is outside the space: True, False"),
        ([{"optim.learning_rate": 0.1}], "point 1: optim.learning_rate = 0.1 is outside the space: 0.0001 .. 0.01, log"),
        ([{"lora.lora_dropout": 0.15}], "point 1: lora.lora_dropout = 0.15 is outside the space: 0 .. 0.2, step 0.1"),
        ([{"lora.target_modules": "attention", "lora.use_rslora": True}],
         "point 1: lora.use_rslora varies only if lora.target_modules is everything, and here it is attention"),
        ([{"lora.lora_dropout": 0.1, "lora.use_rslora": True}], "point 1: no trial varies lora."),
        ([{"lora.rank": 8, "lora": {"rank": 16}}], "point 1: lora.rank is given twice"),
        ([{"lora.rank": 8}, {"lora": {"rank": 8}}], "point 2: is point 1 once more; leave one of them out"),
    ],
)  # fmt: skip
def test_what_is_no_point_of_the_space_is_refused_in_one_line_before_anything_starts(points, line):
    with pytest.raises(InputError) as error:
        make_sweep_plan(config_for(SPACE, first_trials=points))
    assert line in str(error.value) and str(error.value).startswith("sweep.first_trials = {") and "\n" not in str(error.value)


def test_a_point_that_makes_no_valid_config_is_refused():
    """A step of 2,000,000 rows of 8 tokens: each of the two fields is valid with the base's other."""
    space = {"data.max_seq_length": {"choices": [8, 2048]}, "train.tokens_per_step": {"choices": [2048, 16_000_000]}}
    assert own({"data.max_seq_length": 8}, {"train.tokens_per_step": 16_000_000}, space=space)
    with pytest.raises(InputError, match=r"^sweep\.first_trials = .*point 1: not valid in a trial: train\.tokens_per_step"):
        own({"data.max_seq_length": 8, "train.tokens_per_step": 16_000_000}, space=space)


@pytest.mark.parametrize("value", [8, ["a"], {"lora.rank": 8}])
def test_anything_but_a_list_of_mappings_is_refused(value):
    with pytest.raises(InputError, match=r"^sweep\.first_trials"):
        config_for(SPACE, first_trials=value)


def test_more_points_than_trials_is_a_warning_and_a_check_of_the_most_demanding_point_has_none():
    config = config_for(SPACE, num_trials=1, first_trials=[{"lora.rank": 8}, {"lora.rank": 16}])
    plan = make_sweep_plan(config)
    assert [line for line in plan.warnings() if "2 points of sweep.first_trials" in line]
    pinned = plan.pinned({"lora.target_modules": "everything", "lora.rank": 8, "optim.learning_rate": 1e-3}).config
    assert pinned.sweep.first_trials == ()
    make_sweep_plan(parse_sweep_config(pinned.model_dump(mode="json")))  # as a resume reads it
