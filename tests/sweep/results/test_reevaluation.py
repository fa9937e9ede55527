"""The reevaluation agrees within its tolerance, and leaderboard.json keeps it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from engine.command_answers import AdapterEvaluation
from engine.errors import InputError
from sweep.results.reevaluation import Reevaluation, compare

MEASURED = AdapterEvaluation(2.5, 1.25, 7)


def test_a_second_measurement_agrees_within_the_tolerance_of_its_device():
    assert compare(MEASURED, 1.26, "cuda").agrees and not compare(MEASURED, 1.26, "cpu").agrees


def test_it_is_itself_again_after_json_where_null_is_a_loss_that_was_not_finite():
    again = compare(MEASURED, 1.25, "cpu")
    kept = json.loads(json.dumps(again.to_dict()))
    assert Reevaluation.from_dict(kept) == again
    assert set(kept) == {
        "base_eval_loss", "eval_loss", "num_eval_target_tokens", "trial_eval_loss", "agrees", "relative_tolerance"}  # fmt: skip
    lost = Reevaluation.from_dict({**kept, "base_eval_loss": None})
    assert math.isnan(lost.base_eval_loss) and replace(lost, base_eval_loss=2.5) == again


@pytest.mark.parametrize(("changes", "said"), [({"agrees": "yes"}, "reevaluation.agrees = 'yes'"),
                                               ({"trial_eval_loss": "x"}, "reevaluation.trial_eval_loss")])  # fmt: skip
def test_another_type_is_one_line(changes, said):
    with pytest.raises(InputError, match=said):
        Reevaluation.from_dict({**compare(MEASURED, 1.25, "cpu").to_dict(), **changes})
