"""The study, the pruner and the budget go by the metric that decides."""

from __future__ import annotations

import pytest

from engine.errors import InputError
from sweep.config.confirmations import refuse_unconfirmed
from sweep.config.resume_changes import apply_resume_changes
from sweep.config.sweep import parse_sweep_config
from sweep.trials.record import Outcome
from tests.support.studies import WIDE, config_for, ledger_in, report, study_in

METRICS = {"exact_match": True, "at": "every"}


def config_by(metrics=METRICS, objectives=("exact_match",), pruner="successive_halving", sampler="random", **sweep):
    values = config_for(WIDE, sampler, pruner).model_dump(mode="json")
    values["sweep"] |= {"objectives": list(objectives), **sweep}
    return parse_sweep_config({**values, "metrics": metrics})


def scored(rung, loss, score, **changes):
    return report(rung, loss, metrics={} if score is None else {"exact_match": score}, **changes)


def test_the_trial_config_says_what_decides():
    config = config_by()
    assert config.base().metrics.choose_by == config.chosen_by == "exact_match" and config.rule.sign == -1.0
    plain = config_by(objectives=("eval_loss",))
    assert plain.base().metrics.choose_by == "eval_loss" and plain.rule.sign == 1.0
    both = config_by(objectives=("eval_loss", "exact_match"))
    assert both.chosen_by == "eval_loss" and both.rule.objectives == ("eval_loss", "exact_match")


def test_halving_stops_the_worse_half_by_the_metric_not_by_the_loss(tmp_path):
    config = config_by()
    study = study_in(tmp_path, config)
    ledger = ledger_in(tmp_path, config, study=study)
    first, second = ledger.next_trial().number, ledger.next_trial().number
    assert not ledger.reported(first, scored(1, 2.0, 0.8))
    assert ledger.reported(second, scored(1, 1.0, 0.2))  # the lower loss, and pruned
    assert study.record(second).outcome is Outcome.PRUNED
    for rung in (2, 3):
        ledger.reported(first, scored(rung, 2.0, 0.8))
    ledger.ended(first, Outcome.COMPLETE, scored(4, 2.5, 0.9))
    assert study._trial(first).value == -0.9


def test_with_the_metric_at_the_end_alone_the_pruner_goes_by_the_loss(tmp_path):
    config = config_by({"exact_match": True, "at": "last"})
    ledger = ledger_in(tmp_path, config)
    first, second = ledger.next_trial().number, ledger.next_trial().number
    assert not ledger.reported(first, scored(1, 1.0, None))
    assert ledger.reported(second, scored(1, 2.0, None))


def test_a_metric_that_fails_at_a_rung_costs_no_trial_and_without_any_score_the_line_says_why(tmp_path):
    config = config_by()
    study = study_in(tmp_path, config)
    ledger = ledger_in(tmp_path, config, study=study)
    first, second = ledger.next_trial().number, ledger.next_trial().number
    ledger.reported(first, scored(1, 2.0, 0.8))
    assert not ledger.reported(second, scored(1, 1.0, None, metrics_error="metrics.mine = a:b gave no score: KeyError"))
    for rung in (2, 3):
        assert not ledger.reported(second, scored(rung, 1.0, None))
    ledger.ended(second, Outcome.COMPLETE, scored(4, 1.0, None, metrics_error="metrics.mine = a:b gave no score: KeyError"))
    record = study.record(second)
    assert record.outcome is Outcome.FAILED and record.error.startswith("metrics.mine = a:b")


def test_a_target_ends_the_sweep_once_a_trial_reaches_it(tmp_path):
    config = config_by(pruner="none", budget={"target_metric": 0.9})
    from dataclasses import replace

    ledger = ledger_in(tmp_path, config)
    ledger._budget._limits = replace(ledger._limits, sign=config.rule.sign)
    number = ledger.next_trial().number
    assert not ledger.reported(number, scored(1, 2.0, 0.85))
    assert ledger.reported(number, scored(2, 2.0, 0.9))
    assert "target_metric = 0.9 is reached (0.9000)" in ledger._budget.spent()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"objectives": ["f1"]}, "sweep.objectives"), ({"objectives": ["elapsed_s"]}, "sweep.objectives"),
        ({"objectives": ["exact_match", "exact_match"]}, "sweep.objectives"),
        ({"metrics": {"exact_match": True, "at": "finalists"}}, "metrics.at"), ({"sampler": "freeze_thaw"}, "sampler.name"),
        ({"metrics": {**METRICS, "at": [5]}}, "metrics.at"), ({"metrics": {**METRICS, "exactmatch": True}}, "metrics.exactmatch"),
        ({"metrics": {**METRICS, "token_f1": True, "choose_by": "token_f1"}}, "metrics.choose_by"),
        ({"objectives": ["eval_loss"], "budget": {"target_metric": 0.5}}, "sweep.budget.target_metric"),
        ({"choose_within": 0.1}, "sweep.choose_within"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_one_line(changes, field):
    with pytest.raises(InputError) as error:
        config_by(**changes)
    assert error.value.field == field and "\n" not in str(error.value)


def test_a_folder_alone_cannot_permit_that_a_function_runs():
    config = config_by({"mine": "a.b:c", "at": "every"}, objectives=("mine",))
    with pytest.raises(InputError, match="add metrics.mine=a.b:c"):
        refuse_unconfirmed(config, {}, {}, None)
    for given in ({"metrics.mine": "a.b:c"}, {"metrics.own.mine.function": "a.b:c"}):
        refuse_unconfirmed(config, given, {}, None)
        assert apply_resume_changes(config, given) == config
    with pytest.raises(InputError, match="cannot be changed on resume"):
        apply_resume_changes(config, {"metrics.mine": "other:f"})
