"""The sweep folder: where everything a sweep writes lies, written so that a kill leaves whole files only. No torch, no ray.

<name>-<YYYYmmdd-HHMMSS>/
    sweep_config.json   the whole resolved config; resume reads it
    data.json           digests of the samples: whether another sweep's losses compare
    study.journal       Optuna's state, the record of truth
    trials/0003/        train_config.json, reports.jsonl, checkpoint/, adapter/ (the engine's), system.jsonl,
                        result.json, error.txt
    timeline.jsonl      when each trial held which slot
    best/               the winning adapter, ready to load
    examples.json       what base model and winner answered to a few evaluation samples
    leaderboard.md/.json, report.html, driver.log, ray/ (Tune's own files, never read again)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from engine.config.parsing import load_json, to_json
from engine.config.trial import TrainConfig
from engine.errors import InputError, StorageError
from engine.system.file_lock import FileLock
from engine.system.files import write_text
from engine.trial_report import REPORTS, TrialReport, read_reports
from sweep.config.sweep import SweepConfig, parse_sweep_config
from sweep.folder.flush import replace_text


class SweepFolder:
    """Paths of one sweep, and atomic reads and writes in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "sweep_config.json"
        self.data_file = path / "data.json"
        self.journal = path / "study.journal"
        self.timeline = path / "timeline.jsonl"
        self.best = path / "best"
        self.examples_file = path / "examples.json"
        self.log = path / "driver.log"
        self.ray = path / "ray"
        self.lock_file = path / ".lock"
        self.stop_file = path / ".stop"  # while it is there, running trials save and end (sweep/interruption.py)

    @classmethod
    def create(cls, config: SweepConfig, now: datetime) -> SweepFolder:
        """Make a new folder under sweep.output_dir; a name taken in the same second gets a number."""
        parent = Path(config.sweep.output_dir)
        stem = f"{config.sweep.name}-{now:%Y%m%d-%H%M%S}"
        for attempt in range(1, 100):
            folder = cls(parent / (stem if attempt == 1 else f"{stem}-{attempt}"))
            try:
                folder.path.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise InputError("sweep.output_dir", str(parent), f"must be a writable folder ({error.strerror})") from None
            try:
                folder.write_config(config)
            except StorageError as error:
                shutil.rmtree(folder.path, ignore_errors=True)
                raise InputError("sweep.output_dir", str(parent), f"must be a folder with room ({error})") from None
            return folder
        raise InputError("sweep.output_dir", str(parent), f"already holds 99 folders named {stem}")

    @property
    def started_s(self) -> float:
        """When the sweep began, Unix seconds: the lock file is made by the first driver, and never written."""
        return self.lock_file.stat().st_mtime

    @classmethod
    def open(cls, path: str | Path, field: str = "resume") -> SweepFolder:
        """An existing sweep folder; InputError, about the field, where it is none."""
        folder = cls(Path(path))
        if not folder.config_file.is_file():
            raise InputError(field, str(path), "must be a sweep folder (one with a sweep_config.json)")
        folder._refuse_links_out()
        return folder

    def _refuse_links_out(self) -> None:
        """A folder from elsewhere may hold links; what a sweep writes and removes must not be reached through them."""
        inside = self.path.resolve()
        for parent, folders, files in os.walk(self.path):
            for name in (*folders, *files):
                entry = Path(parent, name)
                if entry.is_symlink() and not entry.resolve().is_relative_to(inside):
                    raise InputError("resume", str(entry), f"is a link out of the sweep folder, to {os.readlink(entry)}")

    def write_config(self, config: SweepConfig) -> None:
        """Keys keep their order: that of `space` is the order of dimensions and choices, which Optuna refuses to see changed."""
        write_text(self.config_file, json.dumps(config.model_dump(mode="json"), indent=2) + "\n")

    def read_config(self) -> SweepConfig:
        return parse_sweep_config(load_json(self.config_file))

    def write_data(self, data: dict[str, Any]) -> None:
        """Digests of the samples that the sweep trains and evaluates on."""
        write_text(self.data_file, json.dumps(data, indent=2, sort_keys=True) + "\n")

    def read_data(self) -> dict[str, Any] | None:
        """None in a folder that has no digests yet."""
        return load_json(self.data_file) if self.data_file.is_file() else None

    def write_examples(self, examples: dict[str, Any]) -> None:
        """trial: the winner; examples: prompt, expected, base and adapter of each; error: why there are none, in one line."""
        write_text(self.examples_file, json.dumps(examples, indent=2, ensure_ascii=False) + "\n")

    def read_examples(self) -> dict[str, Any] | None:
        """None where the sweep has not come to its end, or was asked for none."""
        if not self.examples_file.is_file():
            return None
        found = load_json(self.examples_file)
        for example in found.get("examples", []):
            if "reference" in example:  # the word of sweeps before version 0.2
                example["expected"] = example.pop("reference")
        return found

    def trial(self, number: int) -> Path:
        """The folder of one trial: trials/0003."""
        return self.path / "trials" / f"{number:04d}"

    def write_train_config(self, number: int, config: TrainConfig) -> None:
        self.trial(number).mkdir(parents=True, exist_ok=True)
        replace_text(self.trial(number) / "train_config.json", to_json(config) + "\n")

    def write_result(self, number: int, result: dict[str, Any]) -> None:
        replace_text(self.trial(number) / "result.json", json.dumps(result, indent=2, sort_keys=True) + "\n")

    def write_reports(self, number: int, reports: list[TrialReport]) -> None:
        """Those of a trial that another sweep trained; the engine writes the others."""
        replace_text(self.trial(number) / REPORTS, "".join(json.dumps(report.to_dict()) + "\n" for report in reports))

    def has_result(self, number: int) -> bool:
        return (self.trial(number) / "result.json").is_file()

    def reports(self, number: int) -> list[TrialReport]:
        """The trial's reports, ascending by rung; empty where it has none yet."""
        return read_reports(self.trial(number))

    def check_room(self) -> None:
        """StorageError where the disk takes no more: a page is written and removed."""
        probe = self.path / ".room"
        write_text(probe, "." * 4096)
        probe.unlink()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; InputError where another driver has it."""
        lock = FileLock(self.lock_file)
        if not lock.acquire():
            raise InputError("resume", str(self.path), "another driver works in this sweep folder; wait for it, or stop it")
        try:
            yield
        finally:
            lock.release()
