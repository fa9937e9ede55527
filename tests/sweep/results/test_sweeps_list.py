"""`python -m sweep list` says how each sweep of a folder stands, from its files alone."""

from __future__ import annotations

import json
from datetime import datetime

import pytest

from sweep.__main__ import main
from sweep.folder.sweep_folder import SweepFolder
from sweep.trials.record import Outcome
from tests.support.studies import WIDE, config_for, ledger_in, report


def sweep(tmp_path, name: str, *, is_done: bool = True) -> SweepFolder:
    """Make a sweep of two trials; the second one has not ended unless it is done."""
    config = config_for(WIDE, pruner="none", num_trials=2, name=name, output_dir=str(tmp_path / "sweeps"))
    folder = SweepFolder.create(config, datetime(2026, 1, 2))
    ledger = ledger_in(folder.path, config)
    for number, loss in ((0, 2.0), (1, 1.5)):
        ledger.next_trial()
        (folder.trial(number) / "reports.jsonl").write_text(json.dumps(report(1, loss).to_dict()) + "\n")
    ledger.ended(0, Outcome.COMPLETE, report(1, 2.0))
    if is_done:
        ledger.ended(1, Outcome.COMPLETE, report(1, 1.5))
        (folder.path / "leaderboard.json").write_text(json.dumps({"trials": [{"source": None}] * 2}))
    folder.lock_file.touch()
    return folder


@pytest.fixture
def rows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def read() -> dict[str, list[str]]:
        assert main(["list"]) == 0
        header, *lines = capsys.readouterr().out.splitlines()
        assert header.split() == ["sweep", "state", "trials", "ended", "best", "loss", "by", "trial"]
        return {line.split("-2026")[0]: line.split()[1:] for line in lines}

    return read


def test_each_sweep_has_its_state_and_its_best_trial(tmp_path, rows):
    sweep(tmp_path, "done")
    sweep(tmp_path, "halted", is_done=False)
    with sweep(tmp_path, "live", is_done=False).lock():
        found = rows()
    assert found == {
        "done": ["ended", "2", "of", "2", "1.5000", "1"],
        "halted": ["stopped", "1", "of", "2", "2.0000", "0"],
        "live": ["running", "1", "of", "2", "2.0000", "0"],
    }


def test_a_sweep_that_went_on_after_its_end_is_not_ended(tmp_path, rows):
    folder = sweep(tmp_path, "more")
    (folder.path / "leaderboard.json").write_text(json.dumps({"trials": [{"source": None}]}))
    assert rows()["more"][0] == "stopped"


def test_a_damaged_sweep_is_listed_and_hides_no_other(tmp_path, rows):
    sweep(tmp_path, "done")
    sweep(tmp_path, "broken").journal.write_text("nothing\n")
    assert rows()["broken"] == ["cannot", "be", "read", "-", "-", "-"] and rows()["done"][0] == "ended"


def test_a_sweep_that_has_not_begun_and_an_empty_folder(tmp_path, rows, capsys):
    config = config_for(WIDE, num_trials=2, name="new", output_dir=str(tmp_path / "sweeps"))
    SweepFolder.create(config, datetime(2026, 1, 2))
    assert rows()["new"] == ["stopped", "0", "of", "2", "-", "-"]
    (tmp_path / "empty").mkdir()
    assert main(["list", "empty"]) == 0 and capsys.readouterr().out == "no sweep in empty\n"
    assert main(["list", "missing"]) == 2 and "must be a folder with sweeps" in capsys.readouterr().err
