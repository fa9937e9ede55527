"""A page is told what has changed in a sweep since it last asked, from the folder alone."""

from __future__ import annotations

import json
import shutil

import pytest

from engine.system.file_lock import FileLock
from sweep.folder.timeline import Timeline
from sweep.report import build
from sweep.report.collect import Collector
from sweep.space.parse import parse_space
from sweep.steering.command import parse_words
from sweep.steering.history import TakenCommand
from sweep.study.study import Study
from sweep.trials.record import Outcome
from sweep.ui import live_sweep
from sweep.ui.drawn_figures import FIGURES, ON_DARK, DrawnFigures
from sweep.ui.live_sweep import LiveSweep
from tests.support.reports import make_report
from tests.support.swept import SPACE, TAG, swept


@pytest.fixture(autouse=True)
def _look_each_time(monkeypatch):
    monkeypatch.setattr(live_sweep, "LEAST_S", 0.0)


def report_again(folder, number: int, rung: int, end: str = "\n") -> None:
    """Append a report to a trial's file, as the engine does while the trial runs."""
    line = json.dumps(make_report(rung, 1.25, tokens_seen=100 * rung, num_trainable=8).to_dict())
    with open(folder.trial(number) / "reports.jsonl", "a") as file:
        file.write(line[: len(line) // 2] if not end else line + end)


def numbers(answer) -> list[int]:
    return sorted(trial["number"] for trial in answer["trials"])


def test_the_first_answer_has_everything_and_the_next_only_what_changed(tmp_path):
    live = LiveSweep(swept(tmp_path), clock=lambda: 2000.0)
    first = live.changes(None)
    assert first["is_whole"] and numbers(first) == [*range(7)]
    assert first["progress"]["outcomes"] == {"RUNNING": 1, "COMPLETE": 3, "PRUNED": 1, "DIVERGED": 1, "FAILED": 1}
    assert first["about"]["best"] == 5 and first["ranks"][0] == 5 and first["progress"]["num_ended"] == 6
    nothing = live.changes(first["cursor"])
    assert "trials" not in nothing and not nothing["is_whole"] and nothing["cursor"] == first["cursor"]
    report_again(live.folder, 6, 3)
    grown = live.changes(first["cursor"])
    assert numbers(grown) == [6] and grown["trials"][0]["curve"][-1] == [300, 1.25]
    assert numbers(live.changes(None)) == numbers(live.changes("another.3")) == numbers(live.changes("x")) == [*range(7)]


def test_a_trial_that_ends_is_sent_again_to_each_page_that_has_not_seen_it(tmp_path):
    live = LiveSweep(swept(tmp_path))
    early = live.changes(None)["cursor"]
    report_again(live.folder, 6, 3)
    late = live.changes(early)["cursor"]
    config = live.folder.read_config()
    study = Study(live.folder, config, parse_space(config.space))
    study.report(6, 3, 1.25)
    study.tell(6, Outcome.PRUNED)
    for cursor in (early, late):
        (trial,) = live.changes(cursor)["trials"]
        assert (trial["number"], trial["outcome"]) == (6, "PRUNED")


def test_a_torn_last_line_waits_for_its_rest(tmp_path):
    folder = swept(tmp_path)
    live = LiveSweep(folder)
    cursor = live.changes(None)["cursor"]
    report_again(folder, 6, 3, end="")
    for file in (folder.journal, folder.timeline):
        with open(file, "a") as torn:
            torn.write('{"op_code": 4, "tr')
    answer = live.changes(cursor)
    assert "fault" not in answer and [trial["rung"] for trial in answer.get("trials", [])] in ([], [2])
    text = (folder.trial(6) / "reports.jsonl").read_text()
    (folder.trial(6) / "reports.jsonl").write_text(text[: text.rfind("\n") + 1])
    report_again(folder, 6, 3)
    assert live.changes(cursor)["trials"][0]["rung"] == 3


def test_a_damaged_journal_is_one_line_and_the_page_recovers_with_the_file(tmp_path):
    folder = swept(tmp_path)
    live = LiveSweep(folder)
    cursor, whole = live.changes(None)["cursor"], folder.journal.read_text()
    folder.journal.write_text(f"x\n{whole}")
    live = LiveSweep(folder)
    broken = live.changes(cursor)
    assert "damaged journal" in broken["fault"] and "\n" not in broken["fault"] and "trials" not in broken
    folder.journal.write_text(whole)
    assert live.changes(broken["cursor"])["is_whole"]


def test_a_copied_folder_and_one_that_has_not_begun_are_shown(tmp_path):
    folder = swept(tmp_path / "sweep")
    shutil.copytree(folder.path, tmp_path / "copy")
    copy = LiveSweep(type(folder)(tmp_path / "copy")).changes(None)
    assert numbers(copy) == [*range(7)] and not copy["progress"]["is_driven"] and copy["progress"]["left_s"] is None
    for file in (folder.journal, folder.timeline):
        file.unlink()
    begun = LiveSweep(folder).changes(None)
    assert begun["trials"] == [] and begun["slots"] == [] and begun["about"]["best"] is None


def test_what_runs_where_and_the_time_left_are_told_while_a_driver_holds_the_folder(tmp_path):
    folder = swept(tmp_path)
    lock = FileLock(folder.lock_file)
    assert not folder.is_driven() and lock.acquire() and folder.is_driven()
    answer = LiveSweep(folder, clock=lambda: 1070.0).changes(None)
    lock.release()
    (slot,) = answer["slots"]
    assert (slot["name"], slot["trial"], slot["since_s"]) == ("gpu 0", 6, 1060.0)
    assert slot["steady"] == answer["progress"]["steady"] and "% steady, " in slot["steady"]
    assert answer["progress"]["is_driven"] and answer["progress"]["left_s"] > 0.0
    assert not LiveSweep(folder).changes(None)["progress"]["is_driven"]


def test_nothing_in_the_folder_is_written(tmp_path):
    folder = swept(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    live = LiveSweep(folder)
    live.changes(None)
    for title in FIGURES:
        live.figure(title, True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_figures_are_the_reports_own_in_the_colours_of_the_page(tmp_path):
    live = LiveSweep(swept(tmp_path))
    for title in FIGURES:
        light, dark = (json.loads(live.figure(title, is_dark)) for is_dark in (False, True))
        assert len(light["figure"]["data"]) == len(dark["figure"]["data"]) > 0
        assert light["is_current"] and TAG not in json.dumps(light)
    hours = live.figure("Where the hours went", True)
    assert '"#1b9e77"' not in hours and f'"{ON_DARK["#1b9e77"]}"' in hours
    assert live.figure("none", False) is None


def test_a_figure_is_sent_again_only_when_it_is_another_one(tmp_path):
    collector, clock = Collector(swept(tmp_path)), [0.0]
    figures = DrawnFigures(lambda: clock[0])

    def asked(title, have=None):
        return json.loads(figures.get(collector.collect(), title, False, have))

    assert asked("Slots")["version"] == 1 and "figure" in asked("Slots", have=7)
    assert asked("Slots", have=1) == {"version": 1, "is_current": True}
    report_again(collector.folder, 6, 3)  # a trial that runs is in no figure of COMPLETE trials
    assert asked("Slices")["version"] == asked("Slices")["version"] == 1 and asked("Slots", have=1)["version"] == 2


def test_a_figure_that_takes_long_is_drawn_less_often(tmp_path, monkeypatch):
    collector, clock = Collector(swept(tmp_path)), [0.0]
    figures = DrawnFigures(lambda: clock[0])
    sections = build.figure_sections

    def slow(*arguments):
        clock[0] += 3.0
        return sections(*arguments)

    monkeypatch.setattr(build, "figure_sections", slow)
    figures.get(collector.collect(), "Slots", False)
    report_again(collector.folder, 6, 3)
    clock[0] += 59.0
    assert json.loads(figures.get(collector.collect(), "Slots", False, 1)) == {"version": 1, "is_current": False}
    clock[0] += 2.0
    assert json.loads(figures.get(collector.collect(), "Slots", False, 1))["version"] == 2


def test_params_that_differ_come_first(tmp_path):
    space = {"lora.lora_alpha": {"choices": [16]}, **SPACE}
    assert LiveSweep(swept(tmp_path, space=space)).changes(None)["about"]["params"] == [*SPACE, "lora.lora_alpha"]


def test_task_metrics_and_losses_by_set_are_told_of_each_trial(tmp_path):
    live = LiveSweep(swept(tmp_path))
    assert live.changes(None)["about"]["metrics"] == live.changes(None)["about"]["eval_sets"] == []
    line = make_report(3, 0.5, tokens_seen=300, num_trainable=8, metrics={"f1": 0.75}, eval_losses={"a": 0.25, "b": 0.75})
    with open(live.folder.trial(6) / "reports.jsonl", "a") as file:
        file.write(json.dumps(line.to_dict()) + "\n")
    answer = live.changes(None)
    (trial,) = (trial for trial in answer["trials"] if trial["number"] == 6)
    assert (answer["about"]["metrics"], answer["about"]["eval_sets"]) == (["f1"], ["a", "b"])
    assert (trial["metrics"], trial["eval_losses"]["b"], trial["can_win"]) == ({"f1": 0.75}, 0.75, False)


def test_curves_show_the_metric_that_decides_and_the_loss_where_that_decides(tmp_path):
    by_loss, by_metric = (LiveSweep(swept(tmp_path / str(name), metric=name)).changes(None) for name in (None, "exact_match"))
    assert by_loss["about"]["shown_by"] == "eval_loss" and "metric_curves" not in by_loss["trials"][0]
    assert by_metric["about"]["shown_by"] == "exact_match" and by_metric["about"]["best"] == 5
    curve = next(trial for trial in by_metric["trials"] if trial["number"] == 5)["metric_curves"]["exact_match"]
    assert [tokens for tokens, _ in curve] == [100, 200, 300, 400] and curve == sorted(curve)


def test_each_trial_says_which_commands_it_would_refuse_as_the_driver_does(tmp_path):
    live = LiveSweep(swept(tmp_path))

    def refused(number: int) -> dict[str, str]:
        found = next(trial for trial in live.changes(None)["trials"] if trial["number"] == number)["refused"]
        removed = f"the adapter of trial {number} has been removed; leave --warm out to start from zero"
        return found if found.pop("clone --warm") == removed else {}

    assert refused(1).keys() == {"stop", "pause", "go-on", "keep"} and refused(1)["stop"] == "trial 1 is over: COMPLETE"
    assert refused(6) == {"go-on": "trial 6 is not paused: RUNNING"}
    config = live.folder.read_config()
    study = Study(live.folder, config, parse_space(config.space))
    study.commands.add(TakenCommand(parse_words(["pause", "6"], "ann@box", 1.0, "1"), 2.0))
    assert refused(6) == {"pause": "trial 6 does not run: PAUSED"}
    live = LiveSweep(live.folder)  # a page that opens now
    assert refused(6) == {"pause": "trial 6 does not run: PAUSED"}
    study.commands.add(TakenCommand(parse_words(["stop", "6"], "ann@box", 3.0, "2"), 4.0))
    assert set(refused(6).values()) == {"trial 6 is about to stop: ann@box asked for that"} and "clone" not in refused(6)


def test_a_collector_keeps_what_did_not_change(tmp_path):
    collector = Collector(swept(tmp_path))
    first = collector.collect()
    assert collector.collect() is first
    report_again(collector.folder, 6, 3)
    second = collector.collect()
    assert [a is b for a, b in zip(first.records, second.records)] == [True] * 6 + [False]


def test_a_followed_timeline_is_the_one_that_is_read_at_once(tmp_path):
    folder = swept(tmp_path / "sweep")
    lines, file = folder.timeline.read_text().splitlines(keepends=True), tmp_path / "timeline.jsonl"
    followed = Timeline(file, mend=False, follow=True)
    assert not followed.catch_up()
    for line in lines:
        with open(file, "a") as later:
            later.write(line[:9])
        assert not followed.catch_up()
        with open(file, "a") as later:
            later.write(line[9:])
        assert followed.catch_up()
    assert [span.trial for span in followed.open_spans] == [6]
    at_once, settled = Timeline(folder.timeline, mend=False), followed.settled()
    assert settled.spans == at_once.spans and settled.sessions == at_once.sessions and settled.usage == at_once.usage
    assert len(followed.open_spans) == 1  # and goes on
