"""What trials look like to the model."""

import math

import numpy as np
import pytest

from sweep.curves.observations import curve_of, observe
from sweep.curves.situation import CurveState, Stand
from sweep.curves.trial_encoder import TrialEncoder
from sweep.prior.rate_prior import KAPPA, LION_FACTOR, RatePrior
from sweep.space.space import Choice, Range, Space
from sweep.trials.record import Outcome

BASE = {
    "model": {"path": "m"}, "data": {"train": "d.jsonl"}, "lora": {"rank": 16, "lora_alpha": None, "use_rslora": False},
    "optim": {"learning_rate": 2e-4, "weight_decay": 0.1}, "train": {"max_tokens": 8_000},
}  # fmt: skip
RATE = Range("optim.learning_rate", 1e-5, 1e-3, log=True)
RANK = Choice("lora.rank", {8: 8, 32: 32})
ALPHA = Choice("lora.lora_alpha", {16.0: 16.0, 64.0: 64.0})


PRIOR = RatePrior(math.log(1e-4), 0.8, "a test")


def rows(dimensions, trials, prior=None):
    return TrialEncoder(Space(tuple(dimensions)), BASE, prior).encode(trials)


def trial(rate=1e-4, **others):
    return {"optim.learning_rate": rate, **{path.replace("__", "."): value for path, value in others.items()}}


def test_a_rate_counts_relative_to_the_good_rate_of_its_scaling():
    trials = [trial(1e-4, lora__lora_alpha=16.0), trial(1e-4, lora__lora_alpha=64.0), trial(3e-4, lora__lora_alpha=16.0)]
    known = rows([RATE, ALPHA], trials, PRIOR)
    assert known[0, 0] == pytest.approx(KAPPA * math.log(16 / 32))
    assert known[1, 0] - known[0, 0] == pytest.approx(KAPPA * math.log(4))
    assert known[2, 0] - known[0, 0] == pytest.approx(math.log(3))
    np.testing.assert_allclose(np.diff(rows([RATE, ALPHA], trials)[:, 0]), np.diff(known[:, 0]))


def test_alpha_that_follows_the_rank_moves_the_good_rate_with_the_rank():
    trials = [trial(lora__rank=8), trial(lora__rank=32)]
    assert np.diff(rows([RATE, RANK], trials)[:, 0])[0] == pytest.approx(KAPPA * math.log(4))


@pytest.mark.parametrize("prior", [PRIOR, None])
def test_the_ratio_of_lora_plus_and_the_optimizer_move_the_good_rate(prior):
    ratio = Range("optim.loraplus_lr_ratio", 1.0, 16.0, log=True)
    found = rows([RATE, ratio], [trial(optim__loraplus_lr_ratio=value) for value in (1.0, 4.0, 16.0)], prior)
    np.testing.assert_allclose(np.diff(found[:, 0]), KAPPA * math.log(4))
    assert found[1, 1] - found[0, 1] == pytest.approx(found[2, 1] - found[1, 1])
    name = Choice("optim.name", {"adamw": "adamw", "lion": "lion"})
    found = rows([RATE, name], [trial(optim__name=value) for value in ("adamw", "lion")], prior)
    assert np.diff(found[:, 0])[0] == pytest.approx(math.log(LION_FACTOR))


def test_without_a_prior_the_middle_of_the_range_is_0():
    assert rows([RATE], [trial(1e-4)])[0, 0] == pytest.approx(0.0)


def test_a_space_without_rate_and_scaling_has_0_in_the_first_column():
    dropout = Range("lora.lora_dropout", 0.0, 0.1)
    np.testing.assert_allclose(rows([dropout], [{"lora.lora_dropout": 0.05}, {"lora.lora_dropout": 0.1}])[:, 0], 0.0)


def test_numbers_that_act_by_factors_are_spaced_by_factors():
    column = rows([Choice("lora.rank", {4: 4, 16: 16, 64: 64})], [{"lora.rank": rank} for rank in (4, 16, 64)])[:, 1]
    assert column[1] - column[0] == pytest.approx(column[2] - column[1])


def test_a_trial_without_a_conditional_field_has_the_base_s_value():
    column = rows([Range("optim.weight_decay", 0.0, 0.2)], [{}, {"optim.weight_decay": 0.1}, {"optim.weight_decay": 0.2}])[:, 1]
    assert column[0] == column[1] != column[2]


def test_names_and_truth_values_are_equal_or_not():
    rslora = Choice("lora.use_rslora", {True: True, False: False})
    encoder = TrialEncoder(Space((rslora,)), BASE, None)
    assert encoder.is_name.tolist() == [False, True]
    column = encoder.encode([{"lora.use_rslora": True}, {"lora.use_rslora": False}, {}])[:, 1]
    assert len(set(column)) == 3


def state(number, losses, outcome=Outcome.PAUSED):
    return CurveState(number, {}, losses, Stand.FREE, outcome)


PROGRESS = np.array([1.0, 0.75, 0.5, 0.25, 0.0])


def test_losses_count_by_their_excess_over_the_best_of_the_rung():
    seen = observe([curve_of(state(k, (2.0 + k / 10, 1.0 + k / 10))) for k in range(5)], PROGRESS)
    first, second = seen.rung == 0, seen.rung == 1
    unit = 0.1  # the quantile of 0, 0.1, 0.2, 0.3, 0.4
    np.testing.assert_allclose(seen.value[first], np.log1p(np.arange(5) / 10 / unit))
    np.testing.assert_allclose(seen.value[second], np.log1p(np.arange(5) / 10 / (unit / 4)))
    assert seen.unit == pytest.approx(unit / 4)


def test_a_curve_that_rises_again_counts_at_its_lowest():
    assert curve_of(state(0, (2.0, 1.5, 1.8))).losses == (2.0, 1.5, 1.5)


def test_a_diverged_trial_is_far_above_the_others():
    states = [state(0, (2.0, 1.9)), state(1, (2.1,), Outcome.DIVERGED), state(2, (2.1, float("inf")))]
    seen = observe([curve_of(one) for one in states], PROGRESS)
    assert (seen.value[(seen.rung == 1) & (seen.trial > 0)] > 3.0).all()


def test_of_a_long_curve_the_model_sees_rungs_by_factors():
    progress = np.array([math.log(16 / rung) / math.log(16) for rung in range(1, 17)])
    seen = observe([curve_of(state(0, tuple(2.0 - rung / 100 for rung in range(16))))], progress)
    assert sorted(seen.rung.tolist()) == [0, 1, 3, 7, 15]
