"""What exceeds data.eval_limits cannot win, is learnt from as a violated constraint, and prunes nobody."""

from __future__ import annotations

import math

import pytest

from engine.errors import InputError
from engine.sample_losses import SampleLosses
from sweep.cli.console import _end_text, _report_text
from sweep.config.sweep import parse_sweep_config
from sweep.results.leaderboard import board_rows, board_table
from sweep.results.verdict import judge
from sweep.study.samplers import LIMITS, as_seen
from sweep.tracking.mlflow_names import sweep_points, trial_points
from sweep.trials.paired import are_comparable, paired_difference
from sweep.trials.record import Outcome
from tests.support.studies import WIDE, config_for, ledger_in, report, study_in, write_reports

SETS = {"eval": {"support": "a.jsonl", "general": "b.jsonl"}, "eval_weights": {"support": 1.0}}
LIMITED = {**SETS, "eval_limits": {"general": {"above_base": 0.02}}}


def config_with(sampler="random", pruner="none", data=LIMITED, **sweep):
    values = config_for(WIDE, sampler, pruner).model_dump(mode="json")
    values["sweep"] |= sweep
    values["data"] |= data
    return parse_sweep_config(values)


def measured(rung, loss, excess, **changes):
    return report(rung, loss, eval_losses={"general": 2.0 + excess, "support": loss}, eval_excess=excess, **changes)


def ended(tmp_path, config, *curves):
    """Return study and records of trials with these (loss, excess) at each rung."""
    study = study_in(tmp_path, config)
    ledger = ledger_in(tmp_path, config, study=study)
    for curve in curves:
        number, reports = ledger.next_trial().number, [measured(rung, *point) for rung, point in enumerate(curve, 1)]
        write_reports(tmp_path, number, reports)
        for one in reports[:-1]:
            ledger.reported(number, one)
        ledger.ended(number, Outcome.COMPLETE, reports[-1])
    return study, study.records()


def test_the_winner_keeps_to_the_limits_and_optuna_is_told_of_those_that_do_not(tmp_path):
    config = config_with()
    forgets = [(1.5, -0.1), (1.2, 0.01), (1.1, 0.03), (1.0, 0.05)]
    always = [(1.4, 0.3), (1.0, 0.2), (0.9, 0.1), (0.8, 0.15)]
    keeps = [(1.6, -0.1), (1.5, -0.05), (1.4, -0.02), (1.3, -0.01)]
    study, records = ended(tmp_path, config, forgets, always, keeps)
    assert [record.eval_loss for record in records] == [1.5, 0.9, 1.3], "the adapter kept is the best within the limits"
    assert [record.keeps_limits for record in records] == [True, False, True]
    assert config.rule.best(records).number == 2
    assert [record.number for record in config.rule.rank(records)] == [2, 0, 1]
    assert [study._trial(n).constraints[LIMITS] for n in range(3)] == pytest.approx([-0.1, 0.1, -0.01])
    assert [study._trial(n).value for n in range(3)] == [1.5, 0.9, 1.3]
    rows = board_rows(records, config.rule)
    assert [row["rank"] for row in rows] == [1, 2, None]
    header, cells = board_table(rows)
    at = header.index("general")
    assert header[at : at + 3] == ("general", "support", "above limits")
    assert cells[-1][at : at + 3] == ("2.1000", "0.9000", "0.1000")
    assert "0.1000 nats above its limits" in _end_text(records[1]) and "general 2.1500" in _report_text(records[1].reports[-1])
    values = {name: value for name, value, *_ in trial_points(records[2], 3)}
    assert values["eval/loss/general"] == 1.99 and values["eval/above_limits_nats"] == -0.01
    points = sweep_points(judge(records, config.rule).summary())
    assert points["eval/loss/support"] == points["eval/best_loss_nats_per_token"] == 1.3


def test_without_any_trial_within_the_limits_none_wins_and_the_line_names_the_nearest(tmp_path):
    config = config_with()
    _, records = ended(tmp_path, config, [(1.0, 0.3)] * 4, [(2.0, 0.1)] * 4)
    verdict = judge(records, config.rule)
    assert verdict.best is None
    assert verdict.best_line.startswith("No trial keeps to data.eval_limits")
    assert "trial 1 comes nearest, 0.1000" in verdict.best_line


def test_halving_keeps_what_is_within_the_limits_before_a_lower_loss_above_them(tmp_path):
    config = config_with(pruner="successive_halving")
    study = study_in(tmp_path, config)
    ledger = ledger_in(tmp_path, config, num_slots=3, study=study)
    first, second, third = (ledger.next_trial().number for _ in range(3))
    assert not ledger.reported(first, measured(1, 2.0, -0.1))
    assert ledger.reported(second, measured(1, 1.0, 0.1))
    assert study.record(second).outcome is Outcome.PRUNED and study._trial(second).constraints[LIMITS] == 0.1
    assert not ledger.reported(third, measured(1, 1.9, 0.0)), "at the limit is within it"


def test_a_target_that_is_reached_above_the_limits_ends_nothing(tmp_path):
    config = config_with(budget={"target_loss": 1.0})
    ledger = ledger_in(tmp_path, config)
    number = ledger.next_trial().number
    assert not ledger.reported(number, measured(1, 0.9, 0.1))
    assert ledger.reported(number, measured(2, 0.95, 0.0))


def test_the_gaussian_process_sees_both_constraints_of_each_trial(tmp_path):
    config = config_with("gp")
    study, _ = ended(tmp_path, config, [(1.0, 0.3)] * 4, [(2.0, -0.1)] * 4)
    seen = as_seen(config.sampler, study._trials(), 1)
    assert [list(trial.constraints) for trial in seen] == [[LIMITS]] * 2
    assert study.ask() is not None


@pytest.mark.parametrize("sampler", ["freeze_thaw", "cmaes"])
def test_a_sampler_that_cannot_learn_from_limits_is_refused_in_one_line(sampler):
    with pytest.raises(InputError, match=f"sampler.name = '{sampler}': does not learn from data.eval_limits; use sampler=tpe"):
        config_with(sampler)
    config_with(sampler, data=SETS)


def test_the_difference_of_a_weighted_mean_has_the_error_of_its_sets():
    one = SampleLosses("0" * 16, (1.0, 2.0, 4.0, 3.0, 9.0), (2, 2, 2, 3, 3), {"a": 3, "b": 2}, {"a": 3.0, "b": 1.0})
    two = SampleLosses("0" * 16, (1.5, 1.0, 4.5, 2.0, 8.0), (2, 2, 2, 3, 3), {"a": 3, "b": 2}, {"a": 3.0, "b": 1.0})
    found = paired_difference(one, two)
    alone = [
        paired_difference(*(SampleLosses("", losses.sums[part], losses.num_targets[part]) for losses in (one, two)))
        for part in one.parts().values()
    ]
    assert found.nats == pytest.approx(one.mean - two.mean) == pytest.approx(0.75 * alone[0].nats + 0.25 * alone[1].nats)
    assert found.standard_error == pytest.approx(math.hypot(0.75 * alone[0].standard_error, 0.25 * alone[1].standard_error))
    assert (found.num_samples, found.least_samples) == (5, 2) and found.margin(0.05) > alone[0].margin(0.05)
    assert not are_comparable(one, SampleLosses("0" * 16, two.sums, two.num_targets, two.sets, {"a": 1.0, "b": 1.0}))
