"""A cache is not believed: a byte that changed anywhere in it is noticed, named and mended."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.system import checksums
from engine.system import shared_cache as cache
from engine.system.checksums import CHECKSUMS, find_damage, write_checksums

FILES = {"ids.npy": b"\x93NUMPY" + bytes(range(200)), "empty": b"", "deep/part.safetensors": bytes(50) + b"end"}


def fill(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "CHUNK_BYTES", 64)
    (tmp_path / "folder").mkdir()
    fill(tmp_path / "folder")
    write_checksums(tmp_path / "folder")
    assert find_damage(tmp_path / "folder") is None
    return tmp_path / "folder"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.data())
def test_any_byte_that_flips_in_any_file_is_noticed(folder, data):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    at, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    path.write_bytes(content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :])
    try:
        found = find_damage(folder)
        assert found is not None and (path.name in found or CHECKSUMS in found or path.name == CHECKSUMS)
    finally:
        path.write_bytes(content)
    assert find_damage(folder) is None


@pytest.mark.parametrize("change", ["truncated", "grown", "missing", "more", "no checksums", "link", "folder is a link"])
def test_every_other_change_is_noticed_too(folder, tmp_path, change):
    file = folder / "ids.npy"
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif change == "grown":
        file.write_bytes(file.read_bytes() + b"\0")
    elif change == "missing":
        file.unlink()
    elif change == "more":
        (folder / "another").write_text("")
    elif change == "no checksums":
        (folder / CHECKSUMS).unlink()
    elif change == "link":
        shutil.move(file, tmp_path / "ids.npy")
        file.symlink_to(tmp_path / "ids.npy")
    else:
        shutil.move(folder, tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    assert find_damage(folder) is not None


def test_files_that_did_not_change_are_read_once(folder, monkeypatch):
    monkeypatch.setattr(checksums, "_digest", lambda *_: 1 / 0)
    assert find_damage(folder) is None
    (folder / "empty").touch()  # twin: a new time alone makes it look again
    with pytest.raises(ZeroDivisionError):
        find_damage(folder)


def test_a_damaged_folder_of_the_cache_is_named_removed_and_made_again(own_cache, capsys):
    first = cache.build_once("thing-v1", fill)
    assert capsys.readouterr().err == ""
    (first / "ids.npy").write_bytes(b"\x93NUMPY" + bytes(200))
    again = cache.build_once("thing-v1", fill)
    assert again == first and (again / "ids.npy").read_bytes() == FILES["ids.npy"]
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "ids.npy has changed since it was written" in warning and str(first) in warning
    assert cache.build_once("thing-v1", lambda folder: 1 / 0) == first and capsys.readouterr().err == ""


def test_links_in_the_cache_are_not_followed(own_cache, tmp_path, capsys):
    own_cache.mkdir()
    precious = tmp_path / "precious"
    precious.write_text("keep")
    (own_cache / ".thing-v1.lock").symlink_to(precious)
    with pytest.raises(cache.InputError, match="QLORA_SWEEP_CACHE"):
        cache.build_once("thing-v1", fill)
    assert precious.read_text() == "keep"
    (own_cache / ".thing-v1.lock").unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "ids.npy").write_bytes(b"theirs")
    (own_cache / "thing-v1").symlink_to(elsewhere)
    assert (cache.build_once("thing-v1", fill) / "ids.npy").read_bytes() == FILES["ids.npy"]
    assert (elsewhere / "ids.npy").read_bytes() == b"theirs" and "is a link" in capsys.readouterr().err
