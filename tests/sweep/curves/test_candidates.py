"""A new trial takes an untried point: any of a small space, one of some draws of a large one."""

from __future__ import annotations

import math

from sweep.curves.candidates import MOST_LISTED, NUM_BLOCKS, NUM_DRAWN, Candidates
from sweep.space.parse import parse_space
from tests.support.studies import SMALL, WIDE

CONDITIONAL = {
    "lora.target_modules": {"choices": {"attention": ["q_proj"], "all": "all-linear"}},
    "lora.use_rslora": {"choices": [True, False], "when": {"lora.target_modules": "all"}},
}


def points(offer: Candidates, number: int = 0) -> list[str]:
    return sorted(map(str, offer.at(number)))


def test_a_small_space_is_offered_whole_and_a_tried_point_no_more():
    offer = Candidates(parse_space(SMALL), 0)
    assert len(offer.at(0)) == 6 == len(offer.at(7))
    offer.drop({"lora.use_rslora": True, "lora.rank": 4})
    assert len(offer.at(1)) == 5 and not any(point == {"lora.rank": 4, "lora.use_rslora": True} for point in offer.at(1))
    assert [len(Candidates(parse_space(CONDITIONAL), 0).at(0))] == [3]


def test_draws_depend_on_seed_and_number_and_not_on_what_was_asked_before():
    one, other = Candidates(parse_space(WIDE), 3), Candidates(parse_space(WIDE), 3)
    for number in range(3):
        one.at(number)
    assert points(one, 3) == points(other, 3) != points(other, 4)
    assert points(Candidates(parse_space(WIDE), 4), 3) != points(one, 3)
    gone = one.at(3)[5]
    one.drop(gone)
    assert gone not in one.at(3) and len(one.at(3)) == NUM_BLOCKS * NUM_DRAWN - 1


def test_a_new_trial_takes_one_new_block_and_the_oldest_goes():
    offer = Candidates(parse_space(WIDE), 3)
    before, now = offer.at(3), offer.at(4)
    assert now[: -NUM_DRAWN] == before[NUM_DRAWN:] and not any(point in before for point in now[-NUM_DRAWN:])


def test_draws_fill_every_kind_of_range_and_keep_its_grid():
    space = parse_space({
        "optim.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}, "lora.rank": {"low": 4, "high": 64, "step": 4},
        "lora.lora_dropout": {"low": 0.0, "high": 0.3, "step": 0.1},
        "data.max_seq_length": {"low": 64, "high": 4096, "log": True},
        "optim.weight_decay": {"low": 0.0, "high": 0.1},
    })  # fmt: skip
    drawn = [point for number in range(4) for point in Candidates(space, 0).at(NUM_BLOCKS * number)]
    values = {path: [point[path] for point in drawn] for path in drawn[0]}
    assert set(values["lora.rank"]) == set(range(4, 65, 4)) and set(values["lora.lora_dropout"]) == {0.0, 0.1, 0.2, 0.3}
    for path, (low, high) in {"optim.learning_rate": (1e-5, 1e-2), "data.max_seq_length": (64, 4096)}.items():
        assert low <= min(values[path]) and max(values[path]) <= high
        middle = sum(value < math.sqrt(low * high) for value in values[path]) / len(drawn)
        assert 0.45 < middle < 0.55  # equal chances by factors
    assert all(isinstance(value, int) for value in values["data.max_seq_length"]) and space_size(space) > MOST_LISTED


def space_size(space) -> float:
    return math.inf if space.size() is None else space.size()
