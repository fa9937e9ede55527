"""Who wins, in which order the rest stands, and what the leaderboard and `best/` hold."""

import importlib
import json
import math

import pytest

from engine.config.trial import load_train_config
from engine.errors import InputError
from sweep.results.best_folder import write_best
from sweep.results.leaderboard import write_leaderboard
from sweep.trials.record import Outcome, TrialRecord
from sweep.trials.selection import Rule

REEVALUATION = {
    "base_eval_loss": 2.5,
    "eval_loss": 1.2,
    "num_eval_target_tokens": 12345,
    "agrees": True,
    "trial_eval_loss": 1.2001,
}


def report(rung=1, eval_loss=1.0, num_trainable=100, **changes):
    values = {"rung": rung, "tokens_seen": 1000 * rung, "eval_loss": eval_loss, "num_trainable": num_trainable}
    return {**values, "tokens_per_second": 50.0 * rung, "peak_allocated_gib": 1.5, **changes}


def trial(number, *losses, outcome=Outcome.COMPLETE, num_trainable=100, folder="", **changes):
    reports = [report(rung, loss, num_trainable) for rung, loss in enumerate(losses, start=1)]
    config = {"model": {"path": "org/base"}, "data": {"train": "train.jsonl"}, "train": {"max_tokens": 1000}}
    params = {"lora.rank": 8, "optim.learning_rate": 0.00012345}
    return TrialRecord(number, params, config, outcome, str(folder), reports, **changes)


def numbers(records):
    return [record.number for record in records]


def test_the_lowest_loss_over_all_reports_wins_not_the_last_one():
    assert Rule().best([trial(0, 2.0, 1.0, 1.9), trial(1, 1.5, 1.4)]).number == 0


def test_a_pruned_trial_cannot_win_however_low_its_loss():
    assert Rule().best([trial(0, 2.0), trial(1, 0.5, outcome=Outcome.PRUNED)]).number == 0


def test_a_tie_goes_to_the_smaller_adapter_then_to_the_lower_number():
    assert Rule().best([trial(0, 1.00000, num_trainable=200), trial(1, 1.00009, num_trainable=100)]).number == 1
    assert Rule().best([trial(0, 1.00000, num_trainable=200), trial(1, 1.00020, num_trainable=100)]).number == 0
    assert Rule().best([trial(5, 1.0), trial(3, 1.0)]).number == 3


@pytest.mark.parametrize("records", [[], [trial(0)], [trial(0, math.nan)], [trial(0, 1.0, outcome=Outcome.DIVERGED)]])
def test_without_a_complete_trial_that_was_measured_nobody_wins(records):
    assert Rule().best(records) is None


def test_complete_trials_come_first_then_pruned_then_the_rest_by_number():
    records = [
        trial(0, outcome=Outcome.FAILED),
        trial(1, 0.1, outcome=Outcome.PRUNED),
        trial(2, 3.0),
        trial(3, 2.0),
        trial(4, outcome=Outcome.PRUNED),
        trial(5, 0.0, outcome=Outcome.OUT_OF_MEMORY),
    ]
    assert numbers(Rule().rank(records)) == [3, 2, 1, 4, 0, 5]


def test_the_first_of_the_ranking_is_the_winner_also_in_a_tie():
    records = [trial(0, 1.0, num_trainable=200), trial(1, 1.00005, num_trainable=100), trial(2, 1.00001, num_trainable=300)]
    assert Rule().rank(records)[0] is Rule().best(records)
    assert numbers(Rule().rank(records)) == [1, 0, 2]


def test_the_leaderboard_lists_every_trial_and_states_the_rule(tmp_path):
    failed = trial(2, outcome=Outcome.FAILED, error="a | b\nsecond line")
    diverged = trial(3, math.nan, outcome=Outcome.DIVERGED)
    write_leaderboard(tmp_path, [failed, trial(0, 1.2), trial(1, 3.0, outcome=Outcome.PRUNED), diverged], "demo", REEVALUATION)
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
    assert "| 1 | 0 | COMPLETE | 1.2000 | 1,000 | 100 | 50 | 1.50 |  | rank=8, learning_rate=0.000123 |  |" in text
    assert "| a \\| b second line |" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["leaderboard.json", "leaderboard.md"]


def test_the_leaderboard_shows_peaks_beside_what_was_predicted_and_how_each_trial_was_computed(tmp_path):
    plan = {"num_out_of_memory": 1, "micro_batch_size": 2, "activation_checkpointing": "selective"}
    measured = trial(0, 1.2)
    measured.reports[0].update(plan, predicted_peak_gib=1.4)
    unpredicted = trial(1, 1.3)
    unpredicted.reports[0].update(predicted_peak_gib=0.0)
    refused = trial(2, outcome=Outcome.INFEASIBLE, error="needs 30.0 GiB", predicted_gib=28.0)
    spent = trial(3, outcome=Outcome.OUT_OF_MEMORY, error="out of memory", predicted_gib=20.0, measured_gib=23.5)
    write_leaderboard(tmp_path, [refused, measured, unpredicted, spent], "demo", None)
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
    cells = {row.split(" | ")[1]: row.split(" | ")[7:9] for row in text.splitlines() if row.startswith(("| 1", "| 2", "| -"))}
    assert cells == {"0": ["1.50", "1.40"], "1": ["1.50", ""], "3": ["23.50", "20.00"], "2": ["", "28.00"]}


def test_a_leaderboard_without_a_winner_or_a_second_evaluation_is_written_too(tmp_path):
    write_leaderboard(tmp_path, [trial(0, outcome=Outcome.LOST)], "demo", None)
    assert json.loads((tmp_path / "leaderboard.json").read_text())["best_trial"] is None
    assert "Best: none." in (tmp_path / "leaderboard.md").read_text()


@pytest.fixture
def winner(tmp_path):
    adapter = tmp_path / "trial" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    for name in ("adapter_model.safetensors", "tokenizer.json"):
        (adapter / name).write_text(name)
    return trial(7, 1.5, 1.2, 1.3, folder=adapter.parent)


def test_best_holds_the_adapter_its_config_and_a_card(tmp_path, winner):
    write_best(tmp_path / "best", winner, REEVALUATION, "demo")
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "train_config.json",
    ]
    assert load_train_config(tmp_path / "best" / "train_config.json").model.path == "org/base"
    card = (tmp_path / "best" / "README.md").read_text()
    assert card.startswith('---\nbase_model: "org/base"\nlibrary_name: peft\n')
    for part in (
        Rule().text,
        "| base model | 2.5000 | 12.182 |",
        "12,345 target tokens",
        "2,000 of 3,000",
        "python -m engine train_config.json",
    ):
        assert part in card


def test_the_code_in_the_card_compiles_and_loads_four_bit_where_training_did(tmp_path, winner):
    write_best(tmp_path / "best", winner, REEVALUATION, "demo")
    code = (tmp_path / "best" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "load_in_4bit=True" in code


def test_the_card_of_a_builtin_model_says_where_its_base_is(tmp_path, winner):
    write_best(tmp_path / "best", winner, REEVALUATION, "demo")
    assert "builtin:" not in (tmp_path / "best" / "README.md").read_text()  # twin
    winner.config["model"]["path"] = "builtin:smollm2-135m-instruct"
    write_best(tmp_path / "best", winner, REEVALUATION, "demo")
    card = (tmp_path / "best" / "README.md").read_text()
    assert "resolve_model('builtin:smollm2-135m-instruct')" in card
    module = card.split("from ")[-1].split(" import resolve_model")[0]
    assert callable(importlib.import_module(module).resolve_model)


def test_a_disagreeing_second_evaluation_is_said_aloud(tmp_path, winner):
    write_best(tmp_path / "best", winner, {**REEVALUATION, "agrees": False}, "demo")
    assert "**does NOT agree with**" in (tmp_path / "best" / "README.md").read_text()


def test_best_replaces_an_older_one_and_leaves_nothing_beside_it(tmp_path, winner):
    for stale in ("best", ".best.new", ".best.old"):
        (tmp_path / stale).mkdir()
        (tmp_path / stale / "stale").write_text("")
    write_best(tmp_path / "best", winner, REEVALUATION, "demo")
    assert not (tmp_path / "best" / "stale").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "trial"]


def test_a_trial_without_an_adapter_is_refused_and_the_older_best_stays(tmp_path, winner):
    write_best(tmp_path / "best", winner, REEVALUATION, "demo")
    with pytest.raises(InputError, match=r"must hold adapter_config.json and adapter_model.safetensors of trial 8"):
        write_best(tmp_path / "best", trial(8, 1.0, folder=tmp_path / "gone"), REEVALUATION, "demo")
    assert (tmp_path / "best" / "tokenizer.json").exists()
