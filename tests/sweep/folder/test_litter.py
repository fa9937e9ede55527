"""A trial that has ended leaves no checkpoint, and one that may go on keeps its own."""

from __future__ import annotations

import os

import pytest

from sweep.folder.flush import wait_until_flushed
from sweep.folder.litter import checkpoints, freed_bytes
from sweep.folder.sweep_folder import SweepFolder
from sweep.trials.record import Outcome
from tests.support.studies import WIDE, config_for, ledger_in, report

NAMES = ("checkpoint", "checkpoint.previous", ".checkpoint.new", ".checkpoint.old", ".checkpoint.outdated")


def leave(folder: SweepFolder, number: int) -> None:
    """Write what a trial in training may have on disk."""
    trial = folder.trial(number)
    for name in (*NAMES, "adapter"):
        (trial / name).mkdir(parents=True)
        (trial / name / "file").write_bytes(bytes(100))


def left(folder: SweepFolder, number: int) -> list[str]:
    wait_until_flushed()
    return sorted(path.name for path in folder.trial(number).iterdir() if path.is_dir())


@pytest.mark.parametrize(
    "outcome", [Outcome.COMPLETE, Outcome.PRUNED, Outcome.DIVERGED, Outcome.OUT_OF_MEMORY, Outcome.LOST, Outcome.FAILED]
)
def test_the_end_of_a_trial_removes_its_checkpoints_and_keeps_its_adapter(tmp_path, outcome):
    ledger, folder = ledger_in(tmp_path, config_for(WIDE, pruner="none")), SweepFolder(tmp_path)
    first, other = ledger.next_trial().number, ledger.next_trial().number
    leave(folder, first)
    leave(folder, other)
    ledger.reported(first, report(1, 2.0))
    ledger.ended(first, outcome)
    assert left(folder, first) == ["adapter"]
    assert left(folder, other) == sorted([*NAMES, "adapter"])


def test_a_stop_by_the_budget_keeps_them_and_so_does_a_resume(tmp_path):
    config = config_for(WIDE, pruner="none", budget={"target_loss": 3.0})
    ledger, folder = ledger_in(tmp_path, config), SweepFolder(tmp_path)
    number = ledger.next_trial().number
    leave(folder, number)
    assert ledger.reported(number, report(1, 2.0))
    assert ledger.records[0].outcome is Outcome.STOPPED
    ledger_in(tmp_path, config).recover()
    assert left(folder, number) == sorted([*NAMES, "adapter"])


def test_a_resume_removes_what_a_kill_left(tmp_path):
    config = config_for(WIDE, pruner="none")
    ledger, folder = ledger_in(tmp_path, config), SweepFolder(tmp_path)
    number = ledger.next_trial().number
    ledger.ended(number, Outcome.DIVERGED)
    wait_until_flushed()
    leave(folder, number)  # as if the driver had been killed before the removal
    ledger_in(tmp_path, config).recover()
    assert left(folder, number) == ["adapter"]


def test_a_file_with_another_name_elsewhere_frees_nothing(tmp_path):
    folder = tmp_path / "trial"
    for name in ("checkpoint", "checkpoint.previous", "adapter"):
        (folder / name).mkdir(parents=True)
    (folder / "checkpoint" / "adapter.safetensors").write_bytes(bytes(1000))
    (folder / "checkpoint" / "optimizer.pt").write_bytes(bytes(200))
    os.link(folder / "checkpoint" / "adapter.safetensors", folder / "adapter" / "adapter_model.safetensors")
    assert freed_bytes(checkpoints(folder)) == 200
    assert freed_bytes([folder]) == 1200
