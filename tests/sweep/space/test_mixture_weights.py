"""The weights of a mixture are dimensions of the space."""

from __future__ import annotations

import pytest

from engine.errors import InputError
from sweep.cluster.slots import Hardware
from sweep.config.compose import compose
from sweep.config.sweep import parse_sweep_config
from sweep.plan.sweep_plan import make_sweep_plan
from sweep.space.parse import parse_space
from sweep.space.space import value_at
from sweep.study.warm_start import params_in
from sweep.text import params_text

SOURCES = [{"path": "a.jsonl", "weight": 3.0}, {"path": "b.jsonl"}]
GIVEN = ["model=local", "model.path=m", "data=local", "space=none", "data.train=[{path:a.jsonl,weight:3},b.jsonl]"]


def config_with(space, train=SOURCES):
    values = {"model": {"path": "m"}, "data": {"train": train}, "train": {"max_tokens": 100, "device": "cpu"}, "space": space}
    return parse_sweep_config({**values, "sweep": {"num_trials": 2}})


def test_a_weight_varies_alone_and_a_point_is_found_again():
    space = parse_space({"data.train.1.weight": {"low": 0.1, "high": 10.0, "log": True}, "lora.rank": {"choices": [4, 8]}})
    base = config_with({}).base().model_dump(mode="json")
    params = {"data.train.1.weight": 2.5, "lora.rank": 8}
    config = space.apply(base, params)
    assert [source.weight for source in config.data.mixture] == [3.0, 2.5] and value_at(base, "data.train.1.weight") == 1.0
    assert params_in(space, base, config.model_dump(mode="json")) == params
    assert params_text(params) == "train.1.weight=2.5 rank=8"
    assert len(space.single_changes(base)) == 4  # ranks 4 and 8, and both ends of the weight


def test_the_command_line_takes_a_mixture_and_its_weights():
    several = ["+space.data.train.1.weight.low=0.5", "+space.data.train.1.weight.high=2.0"]
    config = parse_sweep_config(compose([*GIVEN, *several]))
    assert [source.weight for source in config.data.mixture] == [3.0, 1.0]
    assert [dimension.path for dimension in parse_space(config.space).dimensions] == ["data.train.1.weight"]
    sets = parse_sweep_config(compose([*GIVEN, "data.eval={support:a.jsonl,general:null}", "data.eval_weights={support:1}"])).data
    assert list(sets.eval_sets) == ["general", "support"] and sets.set_weights == {"general": 0.0, "support": 1.0}


@pytest.mark.parametrize(
    ("space", "train", "said"),
    [
        ({"data.train.2.weight": {"choices": [1, 2]}}, SOURCES, "space.data.train.2.weight = 1: .*data.train mixes 2"),
        ({"data.train.0.weight": {"choices": [1, 2]}}, "a.jsonl", "space.data.train.0.weight = 1: .*mixes none, as"),
        ({"data.train.0.path": {"choices": ["a", "b"]}}, SOURCES, "space.data.train.0.path"),
        ({"data.train.0.weight": {"low": -1.0, "high": 1.0}}, SOURCES, "data.train.0.weight = -1.0"),
        ({f"data.train.{i}.weight": {"low": 0.0, "high": 1.0} for i in (0, 1)}, SOURCES, "weight of zero everywhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_one_line(space, train, said):
    with pytest.raises(InputError, match=said) as error:
        make_sweep_plan(config_with(space, train), lambda cluster: Hardware(0, 2))
    assert "\n" not in str(error.value)


def test_the_plan_warns_if_every_weight_varies():
    leaf = {"low": 0.5, "high": 2.0}
    plan = make_sweep_plan(config_with({f"data.train.{i}.weight": leaf for i in (0, 1)}), lambda cluster: Hardware(0, 2))
    assert any("only their ratios count" in line for line in plan.warnings())
    assert "data       a mixture of 3 x a.jsonl, 1 x b.jsonl" in plan.describe()
