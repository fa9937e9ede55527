"""Files and folders are written completely or not at all, on a full, read-only or failing disk."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.errors import StorageError
from engine.system.files import (
    drop_outdated,
    place_folder,
    settle,
    share_file,
    stage_folder,
    storage_fault,
    write_digested,
    write_folder,
    write_text,
)
from engine.system.shared_cache import build_once


class FullDisk:
    """Fail the n-th writing call. A test raises n until no call fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, code: int = errno.ENOSPC) -> None:
        self.calls, self.number, self.code, self.failed = 0, number, code, False
        for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "mkdir"), (Path, "write_text"),
                            (Path, "write_bytes"), (Path, "hardlink_to"), (shutil, "copyfile")):  # fmt: skip
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, real):
        def call(*arguments, **options):
            self.calls += 1
            if self.calls == self.number:
                self.failed = True
                self.fail(self.code)
            return real(*arguments, **options)

        return call

    @staticmethod
    def fail(code: int) -> None:
        raise OSError(code, os.strerror(code))


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
    assert num_failed >= 7  # twin: the test did reach the write calls
    assert (file.read_text(), (folder / "a").read_text()) == ("new", "new")


def test_files_written_beside_each_other_have_their_content_and_digests_or_raise_the_disks_error(tmp_path):
    contents = {"a": b"a" * 10_000, "b": memoryview(b"b" * 20_000), "c": b""}
    makers = {name: lambda content=content: content for name, content in contents.items()}
    digests = write_digested(tmp_path, makers)
    assert digests == {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    assert {name: (tmp_path / name).read_bytes() for name in contents} == {name: bytes(one) for name, one in contents.items()}
    for number in range(1, 7):  # three files, each written and flushed
        with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            FullDisk(patch, number)
            write_digested(tmp_path, makers)


def write_in_parts(folder, previous, shared):
    """Stage a folder, complete it by a second file, and let its first file take another one's place too."""
    stage_folder(folder, filled("new"))
    place_folder(folder, {"b": "new"}, previous=previous)
    share_file(folder / "a", shared / "a")


def test_a_process_killed_at_any_write_leaves_whole_folders_and_the_next_write_clears_up(tmp_path):
    num_killed = 0
    while True:
        place = tmp_path / str(num_killed)
        folder, previous, shared = place / "d", place / "previous", place / "shared"
        for text in ("older", "old"):
            write_folder(folder, filled(text), previous=previous)
        write_folder(shared, filled("old"))
        child = os.fork()
        if not child:  # no code runs after a kill, so no clean-up either
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(FullDisk, "fail", staticmethod(lambda code: os._exit(9)))
                FullDisk(patch, num_killed + 1)
                write_in_parts(folder, previous, shared)
                os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        settle(folder)
        found = {path.name: path.read_text() for path in folder.iterdir()}
        assert found in ({"a": "old"}, {"a": "new", "b": "new"})
        assert not previous.exists() or (previous / "a").read_text() in ("older", "old")
        assert (shared / "a").read_text() in ("old", "new")
        write_in_parts(folder, previous, shared)
        drop_outdated(folder)
        assert sorted(path.name for path in place.iterdir()) == ["d", "previous", "shared"]
        assert {path.read_text() for path in (folder / "a", folder / "b", shared / "a")} == {"new"}
        if ended == 0:
            break
        num_killed += 1
    assert num_killed >= 12 and os.path.samefile(folder / "a", shared / "a")


def test_what_libraries_say_of_a_full_disk_is_understood_and_other_errors_are_not():
    assert storage_fault(OSError(errno.ENOSPC, "x")) == errno.ENOSPC
    assert storage_fault(RuntimeError("I/O error: No space left on device (os error 28)")) == errno.ENOSPC
    assert storage_fault(OSError("4096 requested and 0 written")) == errno.ENOSPC
    assert storage_fault(FileNotFoundError(errno.ENOENT, "x")) is None
    assert storage_fault(ValueError("no space left")) is None


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_every_file_of_a_folder_follows_the_umask_however_a_library_wrote_it(tmp_path, monkeypatch, umask):
    monkeypatch.setenv("QLORA_SWEEP_CACHE", str(tmp_path / "cache"))
    file_mode, folder_mode, source = 0o666 & ~umask, 0o777 & ~umask, tmp_path / "open to all"
    source.write_text("")
    source.chmod(0o666)

    def fill(folder):
        save_file({"a": np.zeros(2)}, folder / "weights.safetensors")  # through a temporary file of its own
        (folder / "deeper").mkdir(mode=0o700)
        shutil.copy(source, folder / "deeper" / "copy")
        (folder / "plain").write_text("")

    before = os.umask(umask)
    try:
        write_folder(tmp_path / "written", fill)
        built = build_once("built", fill)
        write_text(tmp_path / "text", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "text").stat().st_mode) == file_mode
    for path in (entry for folder in (tmp_path / "written", built) for entry in [folder, *folder.rglob("*")]):
        assert stat.S_IMODE(path.stat().st_mode) == (folder_mode if path.is_dir() else file_mode), path
