"""A config is checked against the card present; a space of which nothing fits is refused."""

from __future__ import annotations

import pytest

from engine.command_answers import Facts, VisibleCard
from engine.errors import InputError
from sweep.plan.feasibility import UNPREDICTED, Feasibility, make_feasibility
from sweep.plan.forecast import check_any_fits, corners
from sweep.space.parse import parse_space
from tests.support.fake_engine import SHAPE
from tests.support.fits import BASE, config_with


def test_a_verdict_says_whether_why_and_by_how_much(planned):
    judge = make_feasibility("rtx4090", Facts(shape=SHAPE)).check_fit
    fits, too_large = judge(config_with(lora={"rank": 8})), judge(config_with(lora={"rank": 64}))
    assert fits.fits and fits.plan.micro_batch_size == 2 and fits.predicted_peak_gib == 8.0 and fits.excess_gib < 0
    assert not too_large.fits and (too_large.reason, too_large.predicted_peak_gib) == ("needs more", 64.0)
    assert too_large.excess_gib == pytest.approx(64.0 - 23.6)


def test_what_changes_neither_memory_nor_speed_is_planned_once(planned):
    judge = make_feasibility("rtx4090", Facts(shape=SHAPE)).check_fit
    for rate in (1e-4, 2e-4):
        judge(config_with(optim={"learning_rate": rate}, lora={"lora_alpha": rate}))
    assert len(planned) == 1
    for size in (1, 2):
        judge(config_with(train={**BASE["train"], "micro_batch_size": size}))
    assert len(planned) == 3


def test_nothing_is_predicted_without_a_card_without_a_shape_or_on_a_cpu(planned):
    config = config_with(lora={"rank": 4096})
    assert Feasibility(SHAPE, None).check_fit(config) is UNPREDICTED
    assert make_feasibility("rtx4090", Facts()).check_fit(config) is UNPREDICTED
    on_cpu = config_with(lora={"rank": 4096}, train={**BASE["train"], "device": "cpu"})
    assert make_feasibility("rtx4090", Facts(shape=SHAPE)).check_fit(on_cpu) is UNPREDICTED
    assert UNPREDICTED.fits and planned == []


def test_auto_means_the_card_found_with_the_memory_it_has(planned):
    found = VisibleCard("Some Card 9000", 12.5)
    assert make_feasibility("auto", Facts(shape=SHAPE, card=found)).card.memory_gib == 12.5
    assert make_feasibility("auto", Facts(shape=SHAPE)).card is None
    assert make_feasibility("a10g", Facts(shape=SHAPE, card=found)).card.name == "a10g"


def test_the_host_memory_of_a_machine_counts_where_it_has_a_gpu(planned):
    found = VisibleCard("Some Card 9000", 12.5)
    config = config_with(lora={"rank": 4, "lora_dropout": 0.5})
    verdict = make_feasibility("auto", Facts(shape=SHAPE, card=found, host_gib=0.25)).check_fit(config)
    assert (verdict.reason, verdict.predicted_peak_gib) == ("needs more on the host", None) and verdict.excess_gib > 0
    assert make_feasibility("rtx4090", Facts(shape=SHAPE, host_gib=0.25)).check_fit(config).fits


def test_corners_are_points_of_the_space_and_conditions_hold():
    targets = {"choices": {"attention": ["q_proj"], "all": "all-linear"}}
    rank = {"choices": [4, 16, 8], "when": {"lora.target_modules": "all"}}
    length = {"low": 256, "high": 1024, "log": True}
    rate = {"low": 1e-4, "high": 1e-2, "log": True}
    space = parse_space({
        "lora.target_modules": targets, "lora.rank": rank, "data.max_seq_length": length, "optim.learning_rate": rate,
    })  # fmt: skip
    points = corners(space)
    low = {"lora.target_modules": "attention", "data.max_seq_length": 256, "optim.learning_rate": 1e-4}
    assert points[0] == low
    assert points[-1] == {
        "lora.target_modules": "all", "lora.rank": 16, "data.max_seq_length": 1024, "optim.learning_rate": 1e-2,
    }  # fmt: skip
    assert {**low, "data.max_seq_length": 1024} in points
    assert all(("lora.rank" in point) == (point["lora.target_modules"] == "all") for point in points)
    assert len(corners(parse_space({"lora.rank": {"choices": list(range(1, 90))}}))) == 24


@pytest.mark.parametrize("length", [{"choices": [512, 1024]}, {"low": 512, "high": 1024}])
def test_a_space_is_refused_only_where_its_least_demanding_point_does_not_fit(planned, length):
    """The space passes even if no single change of the base fits."""
    judge = make_feasibility("rtx4090", Facts(shape=SHAPE))
    base = config_with(lora={"rank": 4096}).model_dump(mode="json")
    wide = parse_space({"lora.rank": {"choices": [64, 8]}, "data.max_seq_length": length})
    check_any_fits(wide, base, judge)
    narrow = parse_space({"lora.rank": {"choices": [64, 32]}, "data.max_seq_length": length})
    with pytest.raises(InputError, match=r"space = 'rank=32 max_seq_length=512': .*rtx4090 \(23\.6 GiB\).* needs more"):
        check_any_fits(narrow, base, judge)
    check_any_fits(narrow, base, make_feasibility("auto", Facts(shape=SHAPE)))
