"""Ray gets a folder that is short enough, or the sweep is refused before anything is written."""

from __future__ import annotations

import pytest

from engine.errors import InputError
from sweep.cluster import ray_folder
from sweep.cluster.ray_folder import MAX_BYTES, settle_ray_folder


@pytest.fixture
def usual(tmp_path_factory, monkeypatch):
    """Make the one usual folder a short one of the test's own."""
    folder = tmp_path_factory.mktemp("u")
    monkeypatch.setattr(ray_folder, "MAX_BYTES", len(str(folder)))
    monkeypatch.setattr(ray_folder, "USUAL", (str(folder),))
    return folder


def long(folder):
    place = folder / ("l" * 89)
    place.mkdir()
    return place


def missing(folder):
    return folder / "x"


def not_a_folder(folder):
    folder.joinpath("f").write_text("")
    return folder / "f"



@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("make", [long, missing, not_a_folder])
def test_a_folder_that_ray_cannot_use_is_replaced_and_named(usual, tmp_path, name, make):
    environment = {name: str(make(tmp_path))}
    line = settle_ray_folder(environment)
    assert environment["RAY_TMPDIR"] == str(usual)
    assert line.startswith(f"{name} ") and line.endswith(f"so Ray's files are in {usual}/ray")
    assert list(usual.iterdir()) == []


def test_a_folder_that_works_is_left_as_it_is(usual):
    for environment in ({}, {"TMPDIR": str(usual)}, {"TMPDIR": ""}):
        before = dict(environment)
        assert settle_ray_folder(environment) is None and environment == before


def test_where_no_folder_works_one_line_names_the_setting(usual, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_folder, "USUAL", (str(tmp_path / "none"),))
    with pytest.raises(InputError, match=r"^TMPDIR = '.*: is too long .* set RAY_TMPDIR to a writable folder of at most \d+"):
        settle_ray_folder({"TMPDIR": str(long(tmp_path))})
    monkeypatch.setattr(ray_folder, "SHARED_MEMORY", tmp_path / "no shm")
    with pytest.raises(InputError, match="no shm.* because Ray shares memory there"):
        settle_ray_folder({})


def test_a_disk_without_room_is_not_used(usual, tmp_path, monkeypatch):
    def no_room(dir):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ray_folder.tempfile, "TemporaryFile", no_room)
    monkeypatch.setattr(ray_folder, "MAX_BYTES", 1000)
    with pytest.raises(InputError, match="No space left on device"):
        settle_ray_folder({"TMPDIR": str(tmp_path)})


def test_the_limit_leaves_room_for_ray_s_own_name():
    assert 30 <= MAX_BYTES == 107 - len("/ray/session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store")
