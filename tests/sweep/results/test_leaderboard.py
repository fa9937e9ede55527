"""The leaderboard lists every trial and states the rule that ranks them."""

import json
import math

from sweep.results.leaderboard import board_rows, board_table, equal_line, write_leaderboard
from sweep.trials.record import Outcome
from sweep.trials.selection import Rule
from tests.support.records import judged, trial


def test_the_leaderboard_lists_every_trial_and_states_the_rule(tmp_path):
    failed = trial(2, outcome=Outcome.FAILED, error="a | b\nsecond line")
    diverged = trial(3, math.nan, outcome=Outcome.DIVERGED)
    records = [failed, trial(0, 1.2), trial(1, 3.0, outcome=Outcome.PRUNED), diverged]
    write_leaderboard(tmp_path, records, "demo", judged(*records))
    board = json.loads((tmp_path / "leaderboard.json").read_text())
    assert [(row["rank"], row["number"], row["outcome"]) for row in board["trials"]] == [
        (1, 0, "COMPLETE"),
        (None, 1, "PRUNED"),
        (None, 2, "FAILED"),
        (None, 3, "DIVERGED"),
    ]
    assert (board["best_trial"], board["rule"], board["trials"][3]["eval_loss"]) == (0, Rule().text, None)
    text = (tmp_path / "leaderboard.md").read_text()
    assert Rule().text in text
    assert "| 1 | 0 | COMPLETE | 1.2000 | 8 | 0.000123 |  | 1,000 | 100 | 50 | 1.50 |  |  |" in text
    assert "| a \\| b second line |" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["leaderboard.json", "leaderboard.md"]


def test_the_leaderboard_shows_peaks_beside_what_was_predicted_and_how_each_trial_was_computed(tmp_path):
    plan = {"num_out_of_memory": 1, "micro_batch_size": 2, "activation_checkpointing": "selective"}
    measured, unpredicted = trial(0, 1.2, reported={**plan, "predicted_peak_gib": 1.4}), trial(1, 1.3)
    refused = trial(2, outcome=Outcome.INFEASIBLE, error="needs 30.0 GiB", predicted_gib=28.0)
    spent = trial(3, outcome=Outcome.OUT_OF_MEMORY, error="out of memory", predicted_gib=20.0, measured_gib=23.5)
    records = [refused, measured, unpredicted, spent]
    write_leaderboard(tmp_path, records, "demo", judged(*records, reevaluation=None))
    board = json.loads((tmp_path / "leaderboard.json").read_text())
    assert board["outcomes"] == {"COMPLETE": 2, "INFEASIBLE": 1, "OUT_OF_MEMORY": 1}
    rows = board["trials"]
    assert [row["number"] for row in rows] == [0, 1, 3, 2]
    assert {name: rows[0][name] for name in plan} == plan
    peaks = [(row["peak_allocated_gib"], row["predicted_peak_gib"]) for row in rows]
    assert peaks == [(1.5, 1.4), (1.5, None), (23.5, 20.0), (None, 28.0)]
    text = (tmp_path / "leaderboard.md").read_text()
    assert "Outcomes: 2 COMPLETE, 1 INFEASIBLE, 1 OUT_OF_MEMORY." in text
    assert "| peak GiB | predicted |" in text
    cells = {row.split(" | ")[1]: row.split(" | ")[10:12] for row in text.splitlines() if row.startswith(("| 1", "| 2", "| -"))}
    assert cells == {"0": ["1.50", "1.40"], "1": ["1.50", ""], "3": ["23.50", "20.00"], "2": ["", "28.00"]}


def test_a_leaderboard_without_a_winner_or_a_second_evaluation_is_written_too(tmp_path):
    lost = trial(0, outcome=Outcome.LOST)
    write_leaderboard(tmp_path, [lost], "demo", judged(lost, reevaluation=None))
    assert json.loads((tmp_path / "leaderboard.json").read_text())["best_trial"] is None
    assert "No trial has gone far enough to be chosen." in (tmp_path / "leaderboard.md").read_text()


def test_sampled_values_that_differ_stand_right_after_what_decides_and_equal_ones_in_a_line(tmp_path):
    records = [trial(number, 1.0 + number) for number in (0, 1)]
    for record, rate in zip(records, (1e-3, 2e-3), strict=True):
        record.params.update({"optim.learning_rate": rate, "train.rank": record.number, "lora.target_modules": "all"})
    rows = board_rows(records)
    header, cells = board_table(rows)
    assert header[:7] == ("rank", "trial", "outcome", "eval loss", "learning_rate", "train.rank", "above lowest")
    assert [row[4:6] for row in cells] == [("0.001", "0"), ("0.002", "1")]
    assert equal_line(rows) == "The same in all trials: rank=8, target_modules=all."
    del records[1].params["optim.learning_rate"]  # another branch of the space
    assert board_table(board_rows(records))[1][1][4] == ""
    write_leaderboard(tmp_path, records, "demo", judged(*records))
    assert "The same in all trials: rank=8, target_modules=all." in (tmp_path / "leaderboard.md").read_text()
