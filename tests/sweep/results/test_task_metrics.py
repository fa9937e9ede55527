"""A task metric decides who wins, in its direction, and every place shows it."""

from __future__ import annotations

import pytest

from engine.scoring.answers_file import RungAnswers, TaskAnswer, write_answers
from sweep.report.finalists_answers import finalists_answers
from sweep.results.contest import contest_text, with_contest
from sweep.results.leaderboard import board_rows, board_table, write_leaderboard
from sweep.results.verdict import judge
from sweep.tracking.mlflow_names import sweep_points, trial_points
from sweep.trials.objectives import objective_values, pareto_front
from sweep.trials.record import Outcome, TrialRecord
from sweep.trials.selection import Rule
from tests.support.reports import make_report

CONFIG = {"model": {"path": "org/base"}, "data": {"train": "t"}, "train": {"max_tokens": 1000, "seed": 0}}
RULE = Rule(("exact_match",), chosen_by="exact_match", sign=-1.0)


def trial(number, *points, folder="", at="every", own=None, outcome=Outcome.COMPLETE, **changes):
    """Build a trial. points: (eval_loss, exact_match or None) of its rungs."""
    metrics = {"choose_by": "exact_match", "at": at, "own": own or {}}
    reports = [
        make_report(rung, loss, metrics={} if score is None else {"exact_match": score}, **changes)
        for rung, (loss, score) in enumerate(points, 1)
    ]
    return TrialRecord(number, {"lora.rank": 8}, {**CONFIG, "metrics": metrics}, outcome, str(folder), reports)


def test_the_best_rung_by_the_metric_is_the_trials_score_and_the_loss_decides_where_it_is_equal():
    one = trial(0, (2.0, 0.5), (1.0, 0.75), (0.5, 0.25))
    assert (one.kept.rung, one.score, one.eval_loss, one.metrics) == (2, -0.75, 1.0, {"exact_match": 0.75})
    assert trial(0, (2.0, 0.5), (1.5, 0.5), (1.6, 0.5)).kept.rung == 2
    late = trial(0, (0.5, None), (1.0, 0.0), at="last")
    assert (late.kept.rung, late.score, late.judged(late.reports[0])) == (2, 0.0, 0.5)
    unmeasured = trial(0, (0.5, None), (0.6, None))
    assert (unmeasured.kept.rung, unmeasured.score) == (1, None)
    wanted_low = trial(0, (1.0, 3.0), (2.0, 1.0), own={"exact_match": {"function": "a:b", "direction": "minimize"}})
    assert (wanted_low.kept.rung, wanted_low.score) == (2, 1.0)


def test_the_winner_is_the_best_by_the_metric_though_another_has_the_lower_loss():
    records = [trial(0, (1.0, 0.5)), trial(1, (1.4, 0.9)), trial(2, (0.9, None)), trial(3, (2.0, 1.0), outcome=Outcome.PRUNED)]
    assert RULE.best(records).number == 1 and Rule().best([trial(0, (1.0, 0.5))]).number == 0
    assert [record.number for record in RULE.rank(records)] == [1, 0, 2, 3]
    assert objective_values(records[1], ("exact_match", "eval_loss")) == (-0.9, 1.4)
    assert objective_values(records[2], ("exact_match",)) is None
    assert RULE.best([trial(0, (1.5, 0.9)), trial(1, (1.4, 0.9))]).number == 1  # equal: the lower loss
    assert "highest exact_match over the reports" in RULE.text and "nats" not in RULE.text
    front = pareto_front(records, ("exact_match", "eval_loss"))
    assert [record.number for record in front] == [1, 0]


def test_choose_within_gives_up_some_of_the_metric_for_another_objective():
    records = [trial(0, (1.0, 0.90), elapsed_s=9.0), trial(1, (1.0, 0.88), elapsed_s=2.0), trial(2, (1.0, 0.5), elapsed_s=1.0)]
    rule = Rule(("exact_match", "elapsed_s"), 0.03, chosen_by="exact_match", sign=-1.0)
    assert rule.best(records).number == 1
    assert Rule(("exact_match", "elapsed_s"), 0.01, chosen_by="exact_match", sign=-1.0).best(records).number == 0  # twin


def answered(number, folder, right, total=40):
    """Build a trial that answers these samples right, with its file of answers."""
    folder.mkdir()
    said = [f"a{i}" if i in right else "?" for i in range(total)]
    scores = [{"exact_match": float(i in right)} for i in range(total)]
    answers = tuple(TaskAnswer(f"q{i}", f"a{i}", said[i], None, scores[i]) for i in range(total))
    write_answers(folder, RungAnswers(1, "d" * 16, answers))
    return trial(number, (1.0 + number, len(right) / total), folder=folder)


def test_trials_are_compared_answer_by_answer(tmp_path):
    best = answered(0, tmp_path / "0", set(range(30)))
    near = answered(1, tmp_path / "1", {*range(1, 30)})
    far = answered(2, tmp_path / "2", set(range(8)))
    contest = with_contest(RULE, [best, near, far]).contest
    assert (contest.lowest, contest.tied, contest.num_samples) == (0, (1,), 40)
    assert contest.differences[1].nats == pytest.approx(1 / 40) and contest.at_least(2) > 0
    line = contest_text(contest, 0, RULE.best_text)
    assert line.startswith("On the same 40 evaluation samples, trial 1 cannot be told apart from trial 0, the highest exact_m")
    (tmp_path / "1" / "answers" / "0001.jsonl").write_text("")
    assert "damaged" in with_contest(RULE, [best, near, far]).contest.left_out[1]


def test_leaderboard_lines_and_mlflow_have_a_column_for_each_metric(tmp_path):
    records = [trial(0, (1.0, 0.5)), trial(1, (1.4, 0.9))]
    header, rows = board_table(board_rows(records, RULE), RULE)
    assert header[3:7] == ("exact_match", "lora.rank", "eval loss", "below highest")
    assert [row[:4] for row in rows] == [("1", "1", "COMPLETE", "0.9000"), ("2", "0", "COMPLETE", "0.5000")]
    assert [row[5] for row in rows] == ["1.4000", "1.0000"]
    verdict = judge(records, RULE)
    assert "eval loss 1.4000 (perplexity 4.055), exact_match 0.9000" in verdict.best_line
    write_leaderboard(tmp_path, records, "s", verdict)
    text = (tmp_path / "leaderboard.md").read_text()
    assert "| exact_match |" in text and "highest exact_match" in text
    points = {name: value for name, value, _, _ in trial_points(records[1], 0)}
    assert points["eval/exact_match"] == 0.9
    assert sweep_points(verdict.summary())["eval/exact_match"] == 0.9
    assert sweep_points({"base_metric_exact_match": 0.1}) == {"eval/base_exact_match": 0.1}


def test_the_report_shows_answers_side_by_side_those_first_in_which_trials_differ(tmp_path):
    records = [answered(0, tmp_path / "0", {0, 1, 2, 3}), answered(1, tmp_path / "1", {0, 1, 3})]
    (section,) = finalists_answers(RULE, records, 3)
    assert section.body.header == ("prompt", "expected", "trial 0", "trial 1")
    assert section.body.rows[0] == ["q2", "a2", "a2\n[exact_match 1]", "?\n[exact_match 0]"] and len(section.body.rows) == 3
    assert "differently on 1, which come first" in section.caption
    assert finalists_answers(RULE, records, 0) == finalists_answers(RULE, [], 3) == []
