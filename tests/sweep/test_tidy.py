"""`python -m sweep.tidy` says what it would remove, and removes nothing that is still of use."""

from __future__ import annotations

import pytest

from sweep.folder.flush import wait_until_flushed
from sweep.folder.sweep_folder import SweepFolder
from sweep.tidy import main
from sweep.trials.record import Outcome
from tests.support.studies import WIDE, config_for, ledger_in, report

KEPT = {"adapter", "checkpoint"}


@pytest.fixture
def folder(tmp_path) -> SweepFolder:
    """Return a sweep as an older version left it: trials 0 COMPLETE, 1 PRUNED, 2 STOPPED, each with everything."""
    config = config_for(WIDE, pruner="none", budget={"target_loss": 1.0})
    ledger, folder = ledger_in(tmp_path, config, num_slots=3), SweepFolder(tmp_path)
    folder.write_config(config)
    for _ in range(3):
        ledger.next_trial()
    ledger.ended(0, Outcome.COMPLETE, report(1, 2.0))
    ledger.ended(1, Outcome.PRUNED, report(1, 3.0))
    ledger.reported(2, report(1, 0.5))
    wait_until_flushed()
    for number in range(3):
        for name in KEPT:
            (folder.trial(number) / name).mkdir(parents=True)
            (folder.trial(number) / name / "file").write_bytes(bytes(2**20))
    (folder.ray / "tune").mkdir(parents=True)
    return folder


def names(folder: SweepFolder) -> list[set[str]]:
    return [{path.name for path in folder.trial(number).iterdir() if path.is_dir()} for number in range(3)]


def test_without_yes_it_only_says_what_it_would_remove(folder, capsys):
    assert main([str(folder.path)]) == 0
    shown = capsys.readouterr().out
    assert "1.0 MiB  trials/0000/checkpoint  (trial 0 is COMPLETE)" in shown
    assert "2.0 MiB could be free again; --yes removes these 3 folders" in shown
    assert names(folder) == [KEPT] * 3 and folder.ray.is_dir()


def test_with_yes_it_removes_the_checkpoints_of_trials_that_have_ended(folder, capsys):
    assert main([str(folder.path), "--yes"]) == 0
    assert "removed 3 folders: 2.0 MiB are free again" in capsys.readouterr().out
    assert names(folder) == [{"adapter"}, {"adapter"}, KEPT] and not folder.ray.exists()
    assert main([str(folder.path), "--yes"]) == 0
    assert capsys.readouterr().out.startswith("nothing to remove")


def test_adapters_goes_further_and_still_keeps_those_that_may_win(folder):
    assert main([str(folder.path), "--yes", "--adapters"]) == 0
    assert names(folder) == [{"adapter"}, set(), KEPT]


def test_a_folder_in_use_is_refused_and_a_damaged_journal_too(folder, capsys):
    with folder.lock():
        assert main([str(folder.path), "--yes"]) == 2
    assert "error: folder = " in (shown := capsys.readouterr().err) and "another driver works" in shown
    folder.journal.write_text("no journal\n")
    assert main([str(folder.path)]) == 2
    assert main([str(folder.path), "--yes"]) == 2
    assert names(folder) == [KEPT] * 3


def test_a_trial_that_the_journal_does_not_know_is_left_alone(folder):
    (folder.trial(7) / "checkpoint").mkdir(parents=True)
    assert main([str(folder.path), "--yes", "--adapters"]) == 0
    assert (folder.trial(7) / "checkpoint").is_dir()


def test_links_are_not_followed(folder, tmp_path_factory, capsys):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (folder.trial(0) / "checkpoint.previous").symlink_to(elsewhere)
    assert main([str(folder.path), "--yes"]) == 2
    assert "must not link out" in capsys.readouterr().err and elsewhere.is_dir()
