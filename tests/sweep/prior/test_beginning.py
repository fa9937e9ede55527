"""A sweep begins with the user's points and those of the prior, and says where they come from."""

from __future__ import annotations

import pytest

from engine.shape.model_shape import ModelShape
from sweep.__main__ import compose
from sweep.config.sweep import parse_sweep_config
from sweep.prior import beginning as module
from sweep.prior.beginning import has_prior, make_beginning
from sweep.space.parse import parse_space
from tests.support.published_models import LLAMA_1B, LLAMA_8B, MISTRAL_7B
from tests.support.studies import config_for

SPACE = {
    "lora.rank": {"choices": [8, 16, 32, 64, 128]},
    "lora.target_modules": {"choices": {"attention": ["q_proj", "v_proj"], "mlp": ["up_proj"], "everything": "all-linear"}},
    "optim.learning_rate": {"low": 2e-5, "high": 2e-3, "log": True},
}
MODEL = ModelShape.of(LLAMA_8B, "config.json")


def begin(space=SPACE, sampler="random", shape=MODEL, prior=True, lora=None, **options):
    config = config_for(space, sampler, prior=prior, **options)
    config = parse_sweep_config({**config.model_dump(mode="json"), "lora": lora or {}})
    return make_beginning(config, parse_space(config.space), shape)


def rates(begun, path="optim.learning_rate"):
    return [point[path] for point in begun.known]


def test_it_begins_with_all_linear_the_middle_rank_and_the_rule_s_rate_then_around_it_then_the_largest_rank():
    """Rank 32 has alpha 64: 2.857e-4 * (32 / 64) ** 0.75 = 1.7e-4, give or take a factor of 2.28."""
    common = {"lora.target_modules": "everything"}
    assert begin().known == (
        {"lora.rank": 32, **common, "optim.learning_rate": 1.7e-4},
        {"lora.rank": 32, **common, "optim.learning_rate": 3.9e-4},
        {"lora.rank": 32, **common, "optim.learning_rate": 7.5e-5},
        {"lora.rank": 128, **common, "optim.learning_rate": 6.0e-5},
    )


def test_it_is_the_same_each_time_and_depends_on_no_seed():
    assert begin(seed=1) == begin(seed=2) == begin()


def test_the_plan_says_the_rate_its_source_and_each_point():
    lines = begin(first_trials=[{"lora.rank": 8}]).describe()
    assert lines[0] == (
        "prior      learning rate 0.00017, give or take a factor of 2.3: 5e-05 * 10 * (2000 / 4096) ** 0.781, Llama's exponent, "
        "for rank 32 with alpha 64"
    )
    assert lines[1] == "first      5 trials: 1 of sweep.first_trials, 4 of the prior"
    assert lines[2] == "  rank=8 target_modules=everything learning_rate=0.00048" and len(lines) == 7


def test_the_plan_of_many_points_fits_a_screen():
    rates = [f"{place + 1}e-5" for place in range(20)]
    lines = begin(prior=False, first_trials=[{"optim.learning_rate": float(rate)} for rate in rates[1:]]).describe()
    assert len(lines) == 14 and lines[-1] == "  and 7 more"


def test_a_point_of_the_user_gets_the_prior_s_rate_for_its_own_rank_unless_it_names_one():
    own = begin(first_trials=[{"lora.rank": 8}, {"lora.rank": 128, "optim.learning_rate": 1e-3}]).own
    assert [point["optim.learning_rate"] for point in own] == [4.8e-4, 1e-3]


def test_a_point_that_the_user_names_is_not_the_prior_s_once_more():
    begun = begin(first_trials=[{"lora.rank": 32, "optim.learning_rate": 3.9e-4}])
    assert len(begun.known) == 3 and not set(rates(begun)) & {3.9e-4}
    assert begun.points([{"earlier": 1}]) == [*begun.own, {"earlier": 1}, *begun.known]


@pytest.mark.parametrize(
    ("leaf", "tried"),
    [
        ({"low": 1e-3, "high": 1e-2, "log": True}, [1e-3, 2.3e-3, 1e-3]),
        ({"low": 1e-6, "high": 1e-5, "log": True}, [1e-5, 4.4e-6, 1e-5]),
        ({"choices": [1e-3, 3e-3]}, [1e-3, 3e-3, 1e-3]),
    ],
)
def test_a_range_without_the_centre_is_begun_at_its_near_end_and_the_plan_says_so(leaf, tried):
    begun = begin({**SPACE, "optim.learning_rate": leaf})
    assert rates(begun) == tried
    assert "; it is outside the space (" in begun.notes[0] and "nearest rate there is tried" in begun.notes[0]
    assert "outside" not in begin().notes[0]


def test_an_enumerable_space_is_begun_at_its_nearest_points():
    named = {"choices": {"low": 1e-4, "mid": 3e-4, "high": 1e-3}}
    begun = begin({"lora.rank": {"choices": [4, 8]}, "optim.learning_rate": named})
    assert [tuple(point.values()) for point in begun.known] == [(8, "mid"), (8, "high"), (8, "low")]
    space = {"lora.rank": {"low": 4, "high": 64, "log": True}}
    assert [point["lora.rank"] for point in begin(space).known] == [16, 64]
    space = {"lora.rank": {"low": 8, "high": 70, "step": 8}}  # 70 is none of its points
    assert [point["lora.rank"] for point in begin(space).known] == [40, 64]


def test_a_searched_alpha_begins_at_32_without_rslora_and_then_the_rate_is_the_rule_s_at_every_rank():
    space = {**SPACE, "lora.lora_alpha": {"choices": [8, 16, 32, 64]}, "lora.use_rslora": {"choices": [True, False]}}
    assert all(not point["lora.use_rslora"] for point in begin(space, lora={"use_rslora": True}).known)
    begun = begin(space)
    assert {(p["lora.lora_alpha"], p["lora.use_rslora"]) for p in begun.known} == {(32, False)}
    assert [p["optim.learning_rate"] for p in begun.known if p["lora.rank"] == 128] == [rates(begun)[0]] == [2.9e-4]


def test_a_field_that_depends_on_another_is_there_only_where_it_varies():
    space = {**SPACE, "lora.use_rslora": {"choices": [True, False], "when": {"lora.target_modules": "attention"}}}
    assert all("lora.use_rslora" not in point for point in begin(space).known)


def test_without_a_known_shape_or_a_searched_rate_the_base_config_s_is_tried_and_the_plan_says_why():
    unknown = begin(shape=None)
    assert rates(unknown) == [2e-4, 2e-4] and unknown.rate is None and "hidden size is not known" in unknown.notes[0]
    fixed = begin({"lora.rank": {"choices": [8, 16, 32]}})
    assert [point["lora.rank"] for point in fixed.known] == [16, 32] and "does not vary optim.learning_rate" in fixed.notes[0]
    assert begin({}).known == () and begin({}).describe() == []


def test_an_unknown_family_is_named():
    assert "the mean exponent, none is known for mistral" in begin(shape=ModelShape.of(MISTRAL_7B, "c")).notes[0]


def test_it_is_off_unless_the_sampler_can_use_it_and_one_key_decides(monkeypatch):
    assert begin(prior=False) == begin(prior="auto") == make_beginning(config_for(SPACE), parse_space(SPACE), MODEL)
    assert begin(prior="auto").points() == [] and begin(prior="auto").rate is None
    monkeypatch.setattr(module, "PRIOR_SAMPLERS", ("tpe",))
    assert begin(sampler="tpe", prior="auto").known == begin(sampler="tpe").known != ()
    assert begin(sampler="tpe", prior=False).points() == []


@pytest.mark.parametrize("objectives", [["eval_loss"], ["eval_loss", "elapsed_s"]])
def test_it_is_the_same_with_several_objectives_and_off_for_a_grid(objectives):
    assert begin(objectives=objectives) == begin()
    grid = {"lora.rank": {"choices": [8, 16]}}
    assert not has_prior(config_for(grid, "grid", prior=True)) and begin(grid, "grid").points() == []
    assert begin(grid, "grid", first_trials=[{"lora.rank": 16}]).points() == [{"lora.rank": 16}]


@pytest.mark.parametrize("name", ["llama-3.1-8b-24gb", "llama-3.2-1b-24gb", "qwen2.5-7b-24gb", "quickstart"])
def test_each_committed_experiment_can_begin_with_it(name):
    config = parse_sweep_config(compose([f"+experiment={name}", "sweep.prior=true"]))
    begun = make_beginning(config, parse_space(config.space), ModelShape.of(LLAMA_1B, "config.json"))
    assert 3 <= len(begun.known) <= 4 and "outside" not in begun.notes[0]
