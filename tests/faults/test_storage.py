"""On a full or read-only disk a sweep ends with one line, loses no trial, and resumes.

The resumed sweep ends as if the disk had never failed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ENV

from .disk import Disk

pytestmark = [pytest.mark.faults, pytest.mark.timeout(500)]
CONFIG = {
    "model": {"path": "m"}, "data": {"train": "t", "max_seq_length": 8},
    "train": {"max_tokens": 400, "num_reports": 4}, "optim": {"eps": 0.3},
    "tracking": {"name": "none"}, "cluster": {"num_cpu_slots": 2}, "pruner": {"name": "none"}, "sampler": {"name": "grid"},
    "space": {"lora.rank": {"choices": [2, 4, 8, 16]}},
}  # fmt: skip


def driver(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.support.fake_driver", *arguments]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def disk(tmp_path):
    try:
        with Disk(tmp_path / "disk") as disk:
            yield disk
    except PermissionError as error:
        pytest.skip(str(error))


def started(disk: Disk, tmp_path: Path) -> tuple[subprocess.Popen, Path]:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**CONFIG, "sweep": {"output_dir": str(disk.path / "sweeps"), "num_trials": 4}}))
    process = driver("start", str(file))
    while not list(disk.path.glob("sweeps/*/trials/0000/reports.jsonl")):
        assert process.poll() is None, process.communicate()
    (folder,) = disk.path.glob("sweeps/*-*")
    return process, folder


def journal_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in folder.joinpath("study.journal").read_bytes().split(b"\n")[:-1]]


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_disk_that_takes_no_more_stops_the_sweep_in_one_line_and_the_resume_completes_it(disk, tmp_path, how):
    process, folder = started(disk, tmp_path)
    if how == "full":
        disk.fill()
    elif not disk.remount("ro,force"):
        process.kill()
        pytest.skip("files are open for writing, and this system does not make such a disk read-only")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 1, (out, err)
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and f"resume={folder}" in lines[0], err
    assert "No space left" in err or "Read-only" in err
    journal_lines(folder)  # every complete line is valid
    if how == "full":
        disk.make_room()
    else:
        assert disk.remount("rw")
    resumed = driver("resume", str(folder))
    _, err = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, err
    board = json.loads((folder / "leaderboard.json").read_text())
    assert board["outcomes"] == {"COMPLETE": 4}
    for number in range(4):
        rungs = [json.loads(line)["rung"] for line in (folder / f"trials/{number:04d}/reports.jsonl").read_text().splitlines()]
        assert rungs == [1, 2, 3, 4]


def test_an_output_folder_that_is_read_only_or_full_is_refused_and_left_as_it_was(disk, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**CONFIG, "sweep": {"output_dir": str(disk.path / "sweeps"), "num_trials": 4}}))
    for prepare, undo in ((lambda: disk.remount("ro"), lambda: disk.remount("rw")), (disk.fill, disk.make_room)):
        prepare()
        process = driver("start", str(file))
        _, err = process.communicate(timeout=100)
        assert process.returncode == 2 and err.startswith("error: sweep.output_dir = ") and err.count("\n") == 1, err
        assert not list(disk.path.glob("sweeps/*"))
        undo()
