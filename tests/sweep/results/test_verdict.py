"""What a sweep has come to is said once: terminal, leaderboard, report, card and tracker agree.

Whole ends run here on records, with an engine that measures what it is told to.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from sweep.folder.timeline import Timeline
from sweep.results.verdict import read_verdict
from sweep.trials.record import Outcome
from sweep.trials.selection import Rule
from tests.support.sweep_ends import Ends

NEW = ("best_folder", "better_earlier_trial")  # in leaderboard.json


@pytest.fixture
def ends(tmp_path, monkeypatch) -> Ends:
    return Ends(tmp_path / "s", monkeypatch)


def test_at_the_end_every_place_names_the_same_winner_and_the_same_second_measurement(ends):
    summary = ends.end(ends.trial(0, 1.5), ends.trial(1, 1.2))
    verdict = read_verdict(ends.folder, ends.records, Rule())
    for line in verdict.lines:
        assert line in ends.page and line in ends.board
    assert [line.split(":")[0] for line in verdict.lines] == ["Best", "Evaluated again after the sweep"]
    assert "best adapter (trial 1)     1.2000" in ends.terminal
    assert (summary["best_trial"], summary["best_eval_loss"], summary["reevaluation_agrees"]) == ("1", 1.2, "True")
    assert "Trial 1." in (ends.folder.best / "README.md").read_text()


def test_the_end_says_what_the_slots_hours_went_to_if_a_worker_measured_it(ends):
    assert "steady_share" not in ends.end(ends.trial(0, 1.5)) and "steady training" not in ends.terminal
    timeline = Timeline(ends.folder.timeline)
    timeline.start_session(0.0, 1)
    timeline.on_assigned(0, 0.0)
    timeline.on_reported(0, 100.0, {"slot": "gpu0", "began_s": 0.0, "parts": {"train": 60.0, "recording": 20.0, "eval": 20.0}})
    summary = ends.end(ends.trial(0, 1.5))
    said = "time         2 min of all slots: 60.0 % steady training, 20.0 % recording and compiling, 20.0 % evaluation"
    assert f"{said}; so 60.0 % steady, 80.0 % with evaluation" in ends.terminal
    assert (summary["steady_share"], summary["train_s"], summary["unreported_s"]) == (0.6, 60.0, 0.0)
    assert summary["steady_share_with_eval"] == pytest.approx(0.8)
    assert [(slot["slot"], slot["eval_s"], slot["steady_share"]) for slot in summary["slots"]] == [("gpu0", 20.0, 0.6)]


def test_a_better_trial_after_a_resume_does_not_wear_the_former_winners_measurement(ends):
    ends.end(ends.trial(0, 1.5), ends.trial(1, 1.2))
    ends.records.append(ends.trial(2, 1.1))  # the resume still runs
    assert "Best so far: trial 2" in ends.page and "Evaluated again" not in ends.page
    assert "best/ still holds the adapter of trial 1, the best before" in ends.page
    ends.end(*ends.records)
    assert "adapter of trial 2 1.1000 nats" in ends.page and "still holds" not in ends.page


def test_a_winner_that_was_trained_on_does_not_wear_its_own_former_measurement(ends):
    ends.end(ends.trial(0, 1.5, outcome=Outcome.STOPPED))
    ends.records = [ends.trial(0, 1.5, 1.3)]
    assert "Evaluated again" not in ends.page and "best/ holds an older adapter of trial 0" in ends.page


def test_a_winner_that_can_win_no_more_is_named_as_what_best_holds(ends):
    ends.end(ends.trial(0, 1.5, outcome=Outcome.STOPPED))
    summary = ends.end(ends.trial(0, 1.5, 1.6, outcome=Outcome.PRUNED))
    line = "best/ holds the adapter of trial 0, which was chosen before and cannot win now."
    assert line in ends.page and line in ends.board and line in ends.terminal
    assert summary["best_trial"] == "none" and "best_eval_loss" not in summary


def test_an_end_that_cannot_measure_says_whose_adapter_best_holds_again_and_again(ends):
    ends.end(ends.trial(0, 1.5))
    for _ in range(2):
        summary = ends.end(ends.trial(0, 1.5), ends.trial(1, 1.2), works=False)
        assert json.loads((ends.folder.path / "leaderboard.json").read_text())["best_folder"] == {"trial": 0}
        line = "best/ still holds the adapter of trial 0, the best before"
        assert line in ends.page and line in ends.board and line in ends.terminal
        assert (summary["best_trial"], summary["best_eval_loss"]) == ("1", 1.2)
        assert summary["reevaluation_agrees"] == "not measured"
    assert (ends.folder.best / "adapter_model.safetensors").read_text() == "0"


def test_a_warm_start_whose_own_trials_are_all_pruned_names_the_better_earlier_adapter(ends):
    earlier = replace(ends.trial(0, 1.4), source="/old/sweep trial 7")
    worse = replace(ends.trial(1, 1.6), source="/old/sweep trial 3")
    summary = ends.end(earlier, worse, ends.trial(2, 1.8, outcome=Outcome.PRUNED))
    line = "An earlier trial did better: eval loss 1.4000, /old/sweep trial 7; its adapter is /old/sweep/trials/0007/adapter."
    assert line in ends.page and line in ends.board and line in ends.terminal
    assert "so there is no adapter to choose" in ends.terminal
    assert summary["better_earlier_trial"] == "/old/sweep trial 7"


def test_an_earlier_trial_that_did_better_is_in_the_card_too_without_its_path(ends):
    own, earlier = ends.trial(1, 1.5), replace(ends.trial(0, 1.4), source="/old/sweep trial 7")
    ends.end(own, earlier)
    card = (ends.folder.best / "README.md").read_text()
    assert "A trial of an earlier sweep did better on the same evaluation set: 1.4000." in card and "/old" not in card
    summary = ends.end(own, replace(earlier, reports=ends.trial(0, 1.6).reports))  # the twin
    assert "did better" not in ends.terminal + ends.board and summary["better_earlier_trial"] == "none"


def test_a_folder_of_an_older_version_is_read_as_it_is(ends):
    ends.end(ends.trial(0, 1.5))
    file = ends.folder.path / "leaderboard.json"
    board = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in board.items() if key not in NEW}))
    assert "adapter of trial 0 1.5000 nats" in ends.page
    ends.records.append(ends.trial(1, 1.2))
    assert "best/ still holds the adapter of trial 0" in ends.page


def test_a_choice_with_control_characters_reaches_no_page_as_more_than_text(ends):
    odd = replace(ends.trial(0, 1.5), params={"lora.rank": "<b>\x1b[2J\n# x"})
    ends.end(odd)
    assert "\x1b" not in ends.board and "\n# x" not in ends.board.split("Outcomes")[0] and "<b>" not in ends.html
