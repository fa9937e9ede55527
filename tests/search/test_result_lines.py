"""Results of replays: the file that grows, the table, and what is done first."""

from __future__ import annotations

import sys

import pytest

from . import replay as command
from .result_lines import read_portions, read_rows, version
from .table import comparison


def command_of(monkeypatch, file, options):
    words = f"replay --synthetic early --slots 2 --costs 2 4 --processes 1 --replays 3 {options} --json {file}"
    monkeypatch.setattr(sys, "argv", words.split())
    command.main()


def test_the_command_prints_a_table_and_writes_every_replay(tmp_path, monkeypatch, capsys):
    file, names = tmp_path / "out.jsonl", ["random_asha", "one_look"]
    command_of(monkeypatch, file, "--strategies random_asha one_look")
    rows = read_rows([file], names)
    assert [(row["strategy"], row["cost"]) for row in rows] == [(name, cost) for name in names for cost in (2.0, 4.0)]
    assert all(list(row[measure]) == [0, 1, 2] for row in rows for measure in ("seen", "judged"))
    printed = capsys.readouterr().out
    assert "| early, 2 slots | cost 2 | cost 4 |" in printed and "random + Ray's ASHA" in printed
    assert read_rows([file, file], names) == rows
    other = tmp_path / "other.jsonl"
    other.write_text(file.read_text().replace('"keep": 0.75', '"keep": 1.0'))
    with pytest.raises(ValueError, match="does not compare"):
        read_rows([file, other], names)


def test_a_command_that_was_ended_goes_on_and_finds_what_one_that_was_not_finds(tmp_path, monkeypatch, capsys):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    monkeypatch.setattr(command, "PORTION", 2)
    command_of(monkeypatch, whole, "--strategies random_asha one_look")
    lines = whole.read_text().splitlines(keepends=True)
    cut.write_text("".join(lines[:3]) + lines[3][:40])  # a kill cut the last line
    capsys.readouterr()
    command_of(monkeypatch, cut, "--strategies random_asha one_look")
    assert "6 of 6 portions are done" in capsys.readouterr().out
    names = ["random_asha", "one_look"]
    found, expected = ([{**row, "seconds": 0} for row in read_rows([file], names)] for file in (cut, whole))
    assert found == expected
    before = whole.read_text()
    command_of(monkeypatch, whole, "--strategies random_asha one_look")
    assert whole.read_text() == before  # nothing is done twice
    command_of(monkeypatch, whole, "--strategies random_asha --replays 5")  # more replays are added
    assert {portion.first for portion in read_portions(whole)[1]} == {0, 2, 4}
    cut.write_text(lines[0].replace(version(), "0"))
    with pytest.raises(SystemExit):
        command_of(monkeypatch, cut, "--strategies random_asha")
    assert f"version was 0 and is {version()} now" in capsys.readouterr().err


def test_what_the_claims_need_is_replayed_first():
    names = ["tpe_halving", "freeze_thaw", "one_look", "random_halving"]
    jobs = command.make_jobs(["a", "b"], names, [16, 4, 1], [16, 2, 8], 10)
    first = [job for job in jobs if job.strategy != "tpe_halving" and job.num_slots < 16 and min(job.costs) <= 8]
    assert jobs[: len(first)] == first and {job.replays.start for job in first[:20]} == {0}
    assert {job.costs for job in jobs if job.strategy == "random_halving"} == {(2, 8, 16)}  # one run serves all
    assert {job.strategy for job in jobs[-12:]} == {"tpe_halving"}


def test_the_comparison_says_where_ours_is_behind():
    row = {"task": "t", "slots": 1, "cost": 4}
    losses = {
        "freeze_thaw": [0.002, 0.004],
        "random_halving": [0.008, 0.016],
        "one_look": [0.001, 0.001],
        "random_asha": [0.003, 0.004],
    }
    line = comparison([{**row, "strategy": name, "seen": dict(enumerate(seen))} for name, seen in losses.items()], "seen")
    assert line == ["t, 1 slots, cost 4: 0.25 (0.25-0.25) of halving's, 100 % near; one_look -2.0 BEHIND, random_asha +0.5 level"]
