"""A sweep over pairs is checked before launch, and can choose by preference accuracy."""

import pytest

from engine.errors import InputError
from engine.sample_losses import SampleLosses
from sweep.config.sweep import parse_sweep_config
from sweep.plan.sweep_plan import make_sweep_plan
from sweep.results.contest import with_contest
from sweep.results.reevaluation import compare
from sweep.study.warm_start import check_comparable
from sweep.trials.record import TrialRecord
from sweep.trials.selection import Rule
from tests.support.records import sampled

PAIRS = {
    "model": {"path": "m"},
    "data": {"train": "pairs.jsonl", "format": "preference"},
    "train": {"max_tokens": 2**20, "num_reports": 2},
}
BETA = {"preference.beta": {"low": 0.05, "high": 0.5, "log": True}}


def config(**sections):
    return parse_sweep_config({**PAIRS, **sections})


def test_accuracy_may_be_the_objective_of_pairs_alone():
    found = config(sweep={"objectives": ["preference_accuracy"]})
    assert found.chosen_by == "preference_accuracy" and found.rule.sign == -1.0
    assert found.base().metrics.choose_by == "preference_accuracy" and found.base().learns_pairs
    with pytest.raises(InputError, match=r"sweep\.objectives"):
        parse_sweep_config({**PAIRS, "data": {"train": "pairs.jsonl"}, "sweep": {"objectives": ["preference_accuracy"]}})


def test_a_space_over_beta_needs_one_beta_that_judges():
    with pytest.raises(InputError, match=r"preference\.eval_beta = None: must be a number"):
        config(space=BETA)
    assert config(space=BETA, preference={"eval_beta": 0.1}).base().preference.judged.beta == 0.1


@pytest.mark.parametrize("path", ["preference.loss", "preference.eval_beta"])
def test_what_makes_losses_incomparable_is_not_searched(path):
    values = ["dpo", "orpo"] if path.endswith("loss") else [0.1, 0.2]
    with pytest.raises(InputError, match="cannot be searched over"):
        make_sweep_plan(config(space={path: {"choices": values}}, train={**PAIRS["train"], "device": "cpu"}))


def test_earlier_sweeps_of_another_beta_do_not_compare():
    check_comparable("earlier", config(preference={"beta": 0.2, "eval_beta": 0.1}), config())
    with pytest.raises(InputError, match=r"eval_beta"):
        check_comparable("earlier", config(preference={"beta": 0.2}), config())


def test_a_row_of_pairs_has_twice_the_length():
    found = config(train={**PAIRS["train"], "tokens_per_step": 16_384}).base()
    assert (found.bin_tokens, found.bins_per_step, found.longest_step) == (4096, 4, 16_384)
    assert found.longest_evaluated == 2048
    other = config(train={**PAIRS["train"], "tokens_per_step": 16_384}, preference={"beta": 0.2}).base()
    assert found.fingerprint() != other.fingerprint()


def losses_of(margins):
    return SampleLosses("0" * 16, tuple(0.7 - margin for margin in margins), (1,) * len(margins), margins=tuple(margins))


def test_the_gain_is_in_nats_a_pair_and_has_no_perplexity():
    base, tuned = losses_of([0.0] * 8), losses_of([0.1, 0.2, 0.3, 0.4, 0.1, 0.2, 0.3, -0.4])
    assert tuned.preference_accuracy == 7 / 8

    class Measured:
        base_eval_loss, eval_loss, num_eval_target_tokens = base.mean, tuned.mean, 40
        base_metrics, metrics = base.preference_metrics, tuned.preference_metrics
        base_sample_losses, sample_losses = base, tuned

    found = compare(Measured, tuned.mean, "cpu")
    assert found.is_of_pairs and found.gain.text.startswith("0.1500 nats a pair")


def test_pruner_and_contest_go_by_accuracy_if_it_decides(tmp_path):
    by_number = {0: losses_of([0.1] * 40), 1: losses_of([0.1] * 36 + [-0.1] * 4), 2: losses_of([0.1] * 39 + [-5.0])}
    records = []
    for number, losses in by_number.items():
        found: TrialRecord = sampled(number, losses, tmp_path / str(number), reported={"metrics": losses.preference_metrics})
        found.config["metrics"] = {"choose_by": "preference_accuracy", "at": "last"}
        records.append(found)
    assert [round(one.judged(one.reports[-1]), 3) for one in records] == [-1.0, -0.9, -0.975]
    rule = with_contest(Rule(("preference_accuracy",), chosen_by="preference_accuracy", sign=-1.0), records)
    assert rule.contest.lowest == 0 and rule.contest.tied == (2,)
    assert rule.contest.differences[1].nats == pytest.approx(0.1)
