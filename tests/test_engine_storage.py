"""A disk that is full, read-only or failing: one line, and what was good before is good after. A torn checkpoint is not used."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.errors import CheckpointError, StorageError
from engine.system import files
from engine.system.files import storage_fault, write_folder, write_text
from engine.training.loop import train

WHOLE: list[dict] = []  # reports of the undisturbed trial, trained once


class FullDisk:
    """Fails the n-th call of a kind that writes; a test walks n until nothing fails any more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, code: int = errno.ENOSPC) -> None:
        self.calls, self.number, self.code, self.failed = 0, number, code, False
        for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "mkdir"), (Path, "write_text"),
                            (Path, "write_bytes")):  # fmt: skip
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, real):
        def call(*arguments, **options):
            self.calls += 1
            if self.calls == self.number:
                self.failed = True
                raise OSError(self.code, os.strerror(self.code))
            return real(*arguments, **options)

        return call


def filled(text):
    return lambda folder: (folder / "a").write_text(text)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_fault_at_any_write_leaves_the_old_file_and_folder_whole(tmp_path, code):
    file, folder = tmp_path / "f", tmp_path / "d"
    write_text(file, "old")
    write_folder(folder, filled("old"))
    number, num_failed = 0, 0
    while True:
        number += 1
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(patch, number, code)
            try:
                write_text(file, "new")
                write_folder(folder, filled("new"))
            except StorageError as error:
                assert os.strerror(code) in str(error) and "\n" not in str(error)
        if not disk.failed:
            break
        num_failed += 1
        assert file.read_text() in ("old", "new") and (folder / "a").read_text() in ("old", "new")
        assert sorted(p.name for p in tmp_path.iterdir() if p.name != ".d.old") == ["d", "f"]
        write_text(file, "old")
        write_folder(folder, filled("old"))
    assert num_failed >= 7  # twin: the walk did meet the write sites
    assert (file.read_text(), (folder / "a").read_text()) == ("new", "new")


def test_what_libraries_say_of_a_full_disk_is_understood_and_other_errors_are_not():
    assert storage_fault(OSError(errno.ENOSPC, "x")) == errno.ENOSPC
    assert storage_fault(RuntimeError("I/O error: No space left on device (os error 28)")) == errno.ENOSPC
    assert storage_fault(OSError("4096 requested and 0 written")) == errno.ENOSPC
    assert storage_fault(FileNotFoundError(errno.ENOENT, "x")) is None
    assert storage_fault(ValueError("no space left")) is None


@pytest.fixture
def trained(tmp_path, tiny_config) -> tuple[TrainConfig, Path, list[dict]]:
    """A trial stopped after its second of three reports, with the reports of the undisturbed one."""
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
    assert losses(again) == losses(whole)[1:]  # the second is computed again, to the last bit
    assert "going on from" in capsys.readouterr().err
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
