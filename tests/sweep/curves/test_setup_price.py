"""What setting up a trial costs is measured once, kept in the journal, and counts in decisions."""

from __future__ import annotations

import pytest

from sweep.curves.setup_price import FREE, SETUP_PRICE, KeptSetupPrice, SetupPrice, measured_price
from tests.support.reports import make_report


class Attributes:
    def __init__(self) -> None:
        self.user_attrs = {}

    def set_user_attr(self, key, value):
        self.user_attrs[key] = value

    def get_trials(self, deepcopy=True):
        return []


def told(begin_s: float, thaw_s: float = 0.0):
    """Return a first report after 1,000 tokens in 10 seconds of steady steps."""
    return make_report(1, setup_s=3.0 + begin_s, model_s=3.0, data_s=thaw_s, attach_s=0.0, recording_s=0.0, train_s=10.0)


@pytest.mark.parametrize(
    ("begin_s", "tokens"),
    [(0.0, 0), (2.4, 0), (2.6, 250), (5.0, 500), (9.0, 1000), (11.0, 1000), (19.0, 2000), (160.0, 16_000)],
)
def test_the_price_is_the_median_in_steps_of_powers_of_two(begin_s, tokens):
    reports = [told(99.0), told(begin_s), told(0.1), told(150.0 + begin_s), told(77.0)]
    assert measured_price(reports, 1, 1000) == SetupPrice(tokens, 0)


def test_the_first_trial_of_each_slot_does_not_count_and_too_few_tell_nothing():
    reports = [told(50.0), told(50.0), told(10.0, 5.0), told(10.0, 5.0), told(10.0, 5.0)]
    assert measured_price(reports, 2, 1000) == SetupPrice(1000, 500)
    assert measured_price(reports, 3, 1000) is None and measured_price(reports[:3], 1, 1000) is None


def test_recordings_count_for_a_beginning_alone_and_old_reports_cost_nothing():
    recorded = make_report(1, setup_s=5.0, model_s=5.0, attach_s=0.0, data_s=0.0, recording_s=20.0, train_s=10.0)
    assert measured_price([recorded] * 4, 1, 1000) == SetupPrice(2000, 0)
    assert measured_price([make_report(1)] * 4, 1, 1000) == FREE  # no parts, no set-up


def test_a_report_of_one_step_has_no_steady_speed():
    first = make_report(1, step=1, setup_s=4.0, model_s=0.0, data_s=2.0, attach_s=0.0, recording_s=20.0, train_s=1e-5)
    # 24 seconds at 50 tokens/s, of which 1,000 tokens were the step itself
    assert measured_price([first] * 4, 1, 100) == SetupPrice(200, 100)


def test_a_kept_price_is_read_again():
    study = Attributes()
    kept = KeptSetupPrice(study)
    assert kept.price is None
    kept.keep(SetupPrice(500, 250))
    assert study.user_attrs == {SETUP_PRICE: [500, 250]} and KeptSetupPrice(study).price == SetupPrice(500, 250)


def test_set_ups_are_taken_off_the_tokens_but_one_trial_can_be_finished():
    assert [SetupPrice(100).tokens_left(1000, count, 2, 250) for count in (0, 3, 8, 50)] == [1000, 700, 250, 250]
    assert SetupPrice(100, 50).tokens_left(1000, 3, 2, 250) == 600
    assert SetupPrice(100).tokens_left(200, 50, 0, 250) == 200 and SetupPrice(100).tokens_left(1000, 50, 0, 0) == 0
    assert FREE.tokens_left(-5, 3, 0, 250) == 0
