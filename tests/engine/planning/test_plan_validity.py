"""A plan is known to stay the same within limits of memory, so that trials need not plan again when memory varies."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.errors import OutOfMemory
from engine.planning.cards import CARDS
from engine.planning.memory_limit import Bounds, Validity
from engine.planning.planner import make_compute_plan
from engine.shape.model_shape import ModelShape
from tests.support.published_models import LLAMA_1B

SHAPE = ModelShape.of(LLAMA_1B, "1B")
LIMITS = [(23.6, 90.0), (23.6, 40.0), (23.5, 3.0), (16.0, 90.0), (9.0, 12.0), (8.9, 2.0), (4.0, 90.0), (3.5, 6.0), (3.5, 5.9)]


def plan(memory_gib, host_gib, **sections):
    """Return the plan within these limits, None if there is none, and its validity."""
    config = parse(TrainConfig, {"model": {"path": "m"}, "data": {"train": "x", "max_seq_length": 4096},
                                 "train": {"max_tokens": 10**6, "tokens_per_step": 8192}, **sections})  # fmt: skip
    validity, card = Validity(), replace(CARDS["rtx4090"], memory_gib=memory_gib)
    try:
        return make_compute_plan(config, SHAPE, card, host_gib, validity=validity), validity
    except OutOfMemory:
        return None, validity


def test_bounds_hold_as_long_as_every_answer_stays():
    bounds = Bounds()
    assert bounds.fits(3.0, 5.0) and bounds.fits(4.0, 5.0) and not bounds.fits(7.0, 5.0) and not bounds.fits(6.5, 5.0)
    assert bounds.holds(4.0) and bounds.holds(6.4) and not bounds.holds(3.9) and not bounds.holds(6.5)


def test_within_its_limits_a_plan_is_the_one_that_would_be_made_and_beyond_them_it_may_not_be():
    made = {limits: plan(*limits) for limits in LIMITS}
    pairs = [(one, other) for one in LIMITS for other in LIMITS if one != other]
    held = [(one, other) for one, other in pairs if made[one][1].holds(*other)]
    assert held and all(made[one][0] == made[other][0] for one, other in held)
    assert len({repr(found) for found, _ in made.values()}) >= 4
    assert all(validity.holds(*limits) for limits, (_, validity) in made.items())


@pytest.mark.parametrize("host_gib", [50.0, 70.0, 200.0])
def test_a_plan_without_host_memory_follows_no_change_of_a_large_one(host_gib):
    assert plan(23.6, 90.0)[1].holds(23.55, host_gib) == (plan(23.55, host_gib)[0] == plan(23.6, 90.0)[0])
