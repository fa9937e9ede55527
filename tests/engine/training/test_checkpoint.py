"""A full or failing disk never makes a torn checkpoint count, and earlier files stay good."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.errors import CheckpointError, StorageError
from engine.system import files
from engine.training.loop import train

WHOLE: list[dict] = []  # reports of the uninterrupted trial, trained once


@pytest.fixture
def trained(tmp_path, tiny_config) -> tuple[TrainConfig, Path, list[dict]]:
    """Return a trial stopped after report 2 of 3, and all reports of the uninterrupted trial."""
    config = parse(TrainConfig, tiny_config)
    whole = WHOLE or WHOLE.extend(report.to_dict() for report in train(config, tmp_path / "whole")) or WHOLE
    reports = train(config, tmp_path / "trial")
    next(reports), next(reports)
    reports.close()
    return config, tmp_path / "trial", whole


def losses(reports):
    return [report["eval_loss"] for report in reports]


def test_a_torn_checkpoint_is_left_for_the_one_before_it_and_the_trial_ends_as_undisturbed(trained, capsys):
    config, folder, whole = trained
    torn = folder / "checkpoint" / "optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:-100])
    again = [report.to_dict() for report in train(config, folder)]
    assert losses(again) == losses(whole)[1:]  # report 2 is computed again, bit for bit
    assert "continuing from" in capsys.readouterr().err
    assert losses(map(json.loads, (folder / "reports.jsonl").read_text().splitlines())) == losses(whole)
    assert not (folder / "checkpoint.previous").exists()


def test_what_a_crash_left_in_the_checkpoint_alone_is_heard_before_anything_is_trained(trained):
    config, folder, whole = trained
    file = folder / "reports.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:1]))
    again = train(config, folder, interrupted=lambda: True)  # no step is taken
    assert losses([next(again).to_dict()]) == losses(whole)[1:2]
    again.close()
    assert losses(map(json.loads, file.read_text().splitlines())) == losses(whole)[:2]
    assert losses(report.to_dict() for report in train(config, folder)) == losses(whole)[2:]


def test_without_a_checkpoint_that_is_whole_a_trial_is_one_line_and_changes_nothing(trained):
    config, folder, _ = trained
    shutil.rmtree(folder / "checkpoint.previous")
    (folder / "checkpoint" / "state.json").write_text("{")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="remove the folder to start this trial again"):
        list(train(config, folder))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.faults
def test_a_disk_that_fills_while_a_trial_saves_leaves_its_last_report_to_go_on_from(trained):
    config, folder, whole = trained
    reports = train(config, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "sync", lambda path: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(StorageError, match="No space left on device"):
            next(reports)
    assert losses(report.to_dict() for report in train(config, folder)) == losses(whole)[2:]
