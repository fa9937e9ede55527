"""The output folder is tried before anything is prepared, and nothing of the trial stays."""

from __future__ import annotations

import errno
import os

import pytest

from engine.errors import InputError
from sweep import driver, preflight
from sweep.folder.output_folder import check_output_folder
from tests.support.fake_driver import ENGINE
from tests.support.fake_sweeps import BASE


@pytest.mark.parametrize("name", ["new", "new/deeper/still", "there", "ä #%1?&'x/ y"])
def test_nothing_stays_behind(tmp_path, name):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("kept")
    check_output_folder(tmp_path / name)
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["there", "mine"]


@pytest.mark.parametrize("name", ["file", "file/below", "dangling", "/proc/sweeps"])
def test_a_place_for_no_folder_is_one_line(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"^sweep.output_dir = .*: must be a writable folder with free space \("):
        check_output_folder(tmp_path / name)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_one_line_and_no_folder_stays(tmp_path, monkeypatch):
    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(InputError, match="No space left on device"):
        check_output_folder(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def unprepared(monkeypatch):
    """Fail if the driver gets as far as model and data."""
    monkeypatch.setattr(preflight, "prepare", lambda *arguments: pytest.fail("prepared before the check"))
    monkeypatch.chdir("/")


def test_the_driver_tries_it_before_it_prepares_model_and_data(tmp_path, unprepared):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"sweep.output_dir"):
        driver.start({**BASE, "sweep": {"output_dir": str(tmp_path / "file")}}, engine=ENGINE)


def test_without_a_home_folder_the_driver_stops_before_it_prepares(tmp_path, unprepared, monkeypatch):
    monkeypatch.setattr("engine.system.files.home_folder", lambda: None)
    with pytest.raises(InputError, match=r"^HOME = None: .* set HOME to a folder"):
        driver.start({**BASE, "sweep": {"output_dir": str(tmp_path / "sweeps")}}, engine=ENGINE)
    assert list(tmp_path.iterdir()) == []
