"""The freezer measures what a set-up costs once, and counts with it from then on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sweep.config.sampler_options import FreezeThawConfig
from sweep.curves.setup_price import SetupPrice
from sweep.curves.situation import Situation, StartNew
from sweep.ledger.answers import Next
from sweep.ledger.ledger import Ledger
from tests.support.studies import WIDE, config_for, ledger_in, report, write_reports


class NewTrials:
    """Begin so many trials, and keep what was asked."""

    def __init__(self) -> None:
        self.left, self.told = 0, []

    def decide(self, situation: Situation) -> StartNew | None:
        self.told.append((situation.setup, situation.tokens_left))
        self.left -= 1
        return StartNew(situation.candidates[0]) if self.left >= 0 else None


@pytest.fixture
def policy(monkeypatch) -> NewTrials:
    policy = NewTrials()
    monkeypatch.setattr("sweep.ledger.freezer.make_policy", lambda *arguments: policy)
    return policy


def open_ledger(path, full_trials: float, setup_tokens: str | int = "auto") -> Ledger:
    config = config_for(WIDE, "freeze_thaw", num_trials=8, budget={"full_trials": full_trials})
    ledger = ledger_in(path, config.model_copy(update={"sampler": FreezeThawConfig(setup_tokens=setup_tokens)}), 1)
    ledger.recover()
    return ledger


def test_the_price_of_a_set_up_is_measured_once_and_is_the_same_after_a_kill(tmp_path, policy):
    ledger, policy.left = open_ledger(tmp_path, 4.0), 4
    for seconds in (90.0, 2.0, 2.2, 50.0):  # the first one warms the slot's process up
        number = ledger.next_trial().number
        first = replace(report(1, 2.0), setup_s=seconds, train_s=1.0)
        write_reports(tmp_path, number, [first])
        assert ledger.reported(number, first)  # it pauses, and another one begins
    assert [setup for setup, _ in policy.told[:-1]] == [SetupPrice()] * (len(policy.told) - 1)
    price = SetupPrice(200, 0)  # 2.2 s at 100 tokens a second, in steps
    assert policy.told[-1] == (price, 1600 - 400 - 4 * price.begin)
    for file in tmp_path.glob("trials/*/reports.jsonl"):  # other seconds now: the journal's price counts
        file.write_text(file.read_text().replace('"train_s": 1.0', '"train_s": 0.001'))
    open_ledger(tmp_path, 4.0).next_trial()
    assert policy.told[-1] == (price, 400)


def test_a_given_price_is_not_measured(tmp_path, policy):
    ledger = open_ledger(tmp_path, 2.0, setup_tokens=50)
    assert ledger.next_trial() is Next.FINISHED and policy.told == [(SetupPrice(50), 800)]
