"""Start whole sweeps under Ray with the fake engine, and read what their folders hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ENV

FAKE_ENV = {**ENV, "FAKE_TORCH": "1"}  # the fake engine's, which computes nothing
BASE = {
    "model": {"path": "m"}, "data": {"train": "t", "max_seq_length": 8},
    "train": {"max_tokens": 400, "num_reports": 4}, "tracking": {"name": "none"},
    "cluster": {"num_cpu_slots": 2},
}  # fmt: skip


def fake_driver(*arguments: str, path: str | None = None, **options) -> subprocess.Popen:
    """Start the fake driver. path: put before PATH."""
    command = [sys.executable, "-m", "tests.support.fake_driver", *arguments]
    env = FAKE_ENV if path is None else {**FAKE_ENV, "PATH": os.pathsep.join([path, ENV["PATH"]])}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def start(tmp_path: Path, path: str | None = None, **sections) -> subprocess.Popen:
    return fake_driver("start", str(write_config(tmp_path, **sections)), path=path)


def write_config(tmp_path: Path, **sections) -> Path:
    """Write a config for the fake driver, with its sweeps below tmp_path."""
    file = tmp_path / "config.json"
    sections.setdefault("sweep", {}).setdefault("output_dir", str(tmp_path / "sweeps"))
    file.write_text(json.dumps({**BASE, **sections}))
    return file


def sweep_folder(tmp_path: Path) -> Path:
    (folder,) = (path for path in (tmp_path / "sweeps").iterdir() if (path / "sweep_config.json").exists())
    return folder


def results(folder: Path) -> dict[int, dict]:
    return {int(file.parent.name): json.loads(file.read_text()) for file in sorted(folder.glob("trials/*/result.json"))}


def rungs(folder: Path, number: int) -> list[int]:
    file = folder / "trials" / f"{number:04d}" / "reports.jsonl"
    return [json.loads(line)["rung"] for line in file.read_text().splitlines()] if file.exists() else []
