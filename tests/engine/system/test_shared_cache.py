"""Processes of a machine build a shared item once, and completely or not at all."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.errors import InputError
from engine.system import shared_cache as cache


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_two_builders_at_once_build_once(own_cache):
    built = []

    def builder(folder):
        built.append(folder)
        time.sleep(0.2)
        (folder / "file").write_text("whole")

    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: cache.build_once("thing-v1", builder), range(2)))
    assert len(built) == 1
    assert folders[0] == folders[1]
    assert (folders[0] / "file").read_text() == "whole"


def test_a_killed_build_leaves_nothing_under_the_name_and_the_next_one_clears_up(own_cache):
    code = (
        "import os\nfrom engine.system.shared_cache import build_once\n"
        "def builder(folder):\n    (folder / 'file').write_text('half')\n    os._exit(9)\nbuild_once('thing-v1', builder)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert not (own_cache / "thing-v1").exists()
    assert list(own_cache.glob(".thing-v1.building-*"))
    folder = cache.build_once("thing-v1", lambda folder: (folder / "other").write_text("whole"))
    assert sorted(path.name for path in folder.iterdir()) == ["checksums.json", "other"]
    assert not list(own_cache.glob(".thing-v1.building-*"))


def test_a_failed_build_raises_its_own_error_and_can_be_tried_again(own_cache):
    def failing(folder):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        cache.build_once("thing-v1", failing)
    assert cache.build_once("thing-v1", lambda folder: None).is_dir()


def test_a_cache_that_cannot_be_written_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"QLORA_SWEEP_CACHE .* must be a writable folder"):
        cache.build_once("thing-v1", lambda folder: None)


def test_a_cache_whose_parent_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.CACHE_VARIABLE, "/proc/none/deeper/cache")
    with pytest.raises(InputError, match=r"QLORA_SWEEP_CACHE .* must be a writable folder"):
        cache.build_once("thing-v1", lambda folder: None)


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch):
    monkeypatch.delenv(cache.CACHE_VARIABLE, raising=False)
    monkeypatch.setattr("engine.system.files.home_folder", lambda: None)
    with pytest.raises(InputError, match=r"^HOME = None: .*set HOME"):
        cache.cache_root()


def test_a_value_is_found_once_and_the_newest_values_of_a_kind_are_kept(own_cache, monkeypatch):
    found = []
    for _ in range(2):
        assert cache.remembered("kind-a", lambda: found.append(1) or {"rows": (1, 2)}) == {"rows": [1, 2]}
    assert found == [1] and cache.recall("kind-b") is None
    (cache.cache_root() / "kind-a" / "value.json").write_text("{")  # damaged
    assert cache.recall("kind-a") is None
    assert cache.remembered("kind-a", lambda: {"rows": 3}) == {"rows": 3} == cache.recall("kind-a")
    monkeypatch.setattr(cache, "MOST", 1)
    cache.remembered("kind-b", lambda: {})
    assert cache.recall("kind-a") is None and cache.recall("kind-b") == {}


def test_old_folders_go_though_another_process_removes_them_too(own_cache, monkeypatch):
    for age in range(4):
        (own_cache / f"kind-{age}").mkdir(parents=True)
        os.utime(own_cache / f"kind-{age}", (age, age))
    listed, stat = [own_cache / f"kind-{age}" for age in range(4)], Path.stat

    def stat_of_one_that_goes(path, **options):
        if path == listed[2] and path in listed:
            listed.remove(path)
            path.rmdir()
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", stat_of_one_that_goes)
    cache.forget_old("kind", 2)
    assert sorted(path.name for path in own_cache.glob("kind-*")) == ["kind-1", "kind-3"]
