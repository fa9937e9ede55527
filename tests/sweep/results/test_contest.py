"""Who cannot be told apart from the lowest loss is said everywhere, and the smaller of them wins.

Whole ends run here on records whose folders hold losses by sample.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from engine.sample_losses import SAMPLE_LOSSES, SampleLosses
from sweep.results.contest import NAMED, contest_text, with_contest
from sweep.trials.paired import Contest, PairedDifference
from sweep.trials.selection import Rule
from tests.support.sweep_ends import Ends

NOISE = (0.002, -0.001, -0.002, 0.001)


def by_sample(mean: float, noise: float = 0.0, digest: str = "a", count: int = 40) -> SampleLosses:
    """Return losses of samples with one target each, around this mean."""
    return SampleLosses(digest, tuple(mean + noise * NOISE[i % 4] for i in range(count)), (1,) * count)


@pytest.fixture
def ends(tmp_path, monkeypatch) -> Ends:
    return Ends(tmp_path / "s", monkeypatch)


def test_of_trials_that_cannot_be_told_apart_the_smaller_adapter_wins_and_every_place_says_so(ends):
    trials = [
        ends.sampled(0, by_sample(1.5), num_trainable=300),
        ends.sampled(1, by_sample(1.5005, noise=2.0), num_trainable=200),
        ends.sampled(2, by_sample(1.6), num_trainable=100),
    ]
    summary = ends.end(*trials)
    line = (
        "On the same 40 evaluation samples, trial 1 cannot be told apart from trial 0, the lowest loss (95 %, 2 other trials "
        "compared); of these, the rule chose trial 1."
    )
    card = (ends.folder.best / "README.md").read_text()
    for place in (ends.terminal, ends.board, ends.page, card):
        assert line in place
    assert (summary["best_trial"], summary["tied_with_lowest"], summary["num_tied"]) == ("1", "1", 1)
    assert "or within 0.005 nats and not told apart from it by the same 40 evaluation samples" in ends.board
    assert "| 1.5005 | 8 | 0.000123 | 0.0005, tied |" in ends.board and "| 0.1000, at least 0.1000 |" in ends.board
    board = json.loads((ends.folder.path / "leaderboard.json").read_text())
    assert board["contest"] == {"lowest": 0, "level": 0.95, "num_samples": 40, "num_compared": 2, "tied": [1], "left_out": []}
    assert [row["number"] for row in board["trials"]] == [1, 0, 2] and board["trials"][1]["above_lowest"] is None


def test_what_is_told_apart_or_too_far_above_does_not_win_however_small(ends):
    lowest = ends.sampled(0, by_sample(1.5), num_trainable=300)
    told_apart = ends.sampled(1, by_sample(1.502), num_trainable=200)
    tied_but_far = ends.sampled(2, by_sample(1.52, noise=100.0), num_trainable=100)
    summary = ends.end(lowest, told_apart, tied_but_far)
    assert (summary["best_trial"], summary["tied_with_lowest"]) == ("0", "2")
    ends.end(lowest, told_apart)
    assert "samples, every other trial is told apart from trial 0, the lowest loss (95 %, 1 other trial compared)." in ends.board


def test_with_tie_within_0_the_lowest_loss_wins_and_ties_are_said_all_the_same(ends):
    records = [ends.sampled(0, by_sample(1.5), num_trainable=300), ends.sampled(1, by_sample(1.5005, 2.0), num_trainable=200)]
    assert with_contest(Rule(tie_within=0.005), records).best(records).number == 1  # the twin
    plain = with_contest(Rule(), records)
    assert plain.best(records).number == 0 and plain.contest.tied == (1,) and "told apart" not in plain.text


def test_of_tied_trials_of_one_size_the_lower_loss_wins_and_choose_within_comes_first(ends):
    alike = [ends.sampled(0, by_sample(1.5005, 2.0)), ends.sampled(1, by_sample(1.5))]
    assert with_contest(Rule(tie_within=0.005), alike).best(alike).number == 1
    reported = {"peak_allocated_gib": 9.0}
    sizes = [ends.sampled(0, by_sample(1.5), reported=reported, num_trainable=1), ends.sampled(1, by_sample(1.5005, 2.0))]
    rule = Rule(("eval_loss", "peak_allocated_gib"), 0.0002, 0.005)
    assert with_contest(rule, sizes).best(sizes).number == 1


def test_a_sweep_without_losses_by_sample_keeps_its_rule_and_says_so(ends):
    old = [ends.trial(0, 1.5, num_trainable=300), ends.sampled(1, by_sample(1.5005, 2.0), num_trainable=200)]
    summary = ends.end(*old)
    line = "Trials are compared by their mean loss alone: trial 0, the lowest, has no losses by sample."
    assert line in ends.terminal and line in ends.board and line in ends.page
    assert (summary["best_trial"], summary["tied_with_lowest"]) == ("0", "not compared") and "num_tied" not in summary
    assert "told apart" not in ends.board


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.unlink(), "no losses by sample"),
        (lambda file: file.write_text("{"), "damaged losses by sample"),
        (lambda file: file.write_text(file.read_text().replace('"rung":1', '"rung":2')), "damaged losses by sample"),
        (lambda file: file.write_text(file.read_text().replace('"a"', '"b"')), "losses on other evaluation samples"),
    ],
)
def test_a_trial_whose_losses_cannot_be_compared_is_named_and_cannot_win_by_a_tie(ends, damage, said):
    records = [
        ends.sampled(0, by_sample(1.5), num_trainable=300),
        ends.sampled(1, by_sample(1.5005, 2.0), num_trainable=200),
        ends.sampled(2, by_sample(1.5006, 2.0), num_trainable=100),
    ]
    assert ends.end(*records)["best_trial"] == "2"  # the twin
    damage(ends.folder.trial(2) / SAMPLE_LOSSES)
    assert ends.end(*records)["best_trial"] == "1"
    assert f"Compared by mean loss alone: trial 2 ({said})." in ends.board


def test_a_tie_with_a_trial_that_is_the_lowest_no_more_decides_nothing(ends):
    records = [ends.sampled(0, by_sample(1.5), num_trainable=300), ends.sampled(1, by_sample(1.5005, 2.0), num_trainable=200)]
    rule = with_contest(Rule(tie_within=0.005), records)
    better = ends.sampled(2, by_sample(1.499), num_trainable=400)
    assert rule.best([*records, better]) is better
    assert with_contest(rule, [*records, better]).contest.lowest == 2
    assert with_contest(rule, [better]).contest is None


def test_the_gain_over_the_base_model_is_said_with_its_interval(ends):
    ends.by_sample = {"base_sample_losses": by_sample(3.0), "sample_losses": by_sample(1.5, noise=10.0)}
    summary = ends.end(ends.sampled(0, by_sample(1.5, noise=10.0)), ends.sampled(1, by_sample(2.0)))
    low, high = summary["gain_low"], summary["gain_high"]
    assert summary["gain"] == pytest.approx(1.5) and low < 1.5 < high and high - low == pytest.approx(0.0118, abs=0.002)
    said = f"1.5000 nats per target token (95 %: {low:.4f} to {high:.4f}, 40 evaluation samples, chosen among 2 trials)"
    for place in (ends.terminal, ends.board, ends.page, (ends.folder.best / "README.md").read_text()):
        assert said in place
    ends.by_sample = {}  # the twin: an engine that answers no losses by sample
    assert "gain" not in ends.end(*ends.records) and "Gain" not in ends.board


@pytest.mark.parametrize("change", [{"evaluation_digest": "b"}, {"sums": (3.0,), "num_targets": (1,)}])
def test_a_gain_that_the_samples_do_not_give_is_not_said(ends, change):
    ends.by_sample = {"base_sample_losses": replace(by_sample(3.0, count=1), **change), "sample_losses": by_sample(1.5, count=1)}
    assert "gain" not in ends.end(ends.sampled(0, by_sample(1.5)))


def test_a_long_list_of_ties_is_counted():
    others = {number: PairedDifference(0.0, 1.0, 9) for number in range(1, NAMED + 4)}
    text = contest_text(Contest(0, 9, others), 0)
    assert "11, 12 and 3 more cannot be told apart from trial 0" in text and "13" not in text
