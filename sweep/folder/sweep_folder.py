"""Lay out the sweep folder, which holds everything that a sweep writes.

A kill leaves whole files only.

<name>-<YYYYmmdd-HHMMSS>/
    sweep_config.json   the whole resolved config; resume reads it
    data.json           digests of samples and base model, to check that losses compare, and what
                        became of the data's rows
    card.txt            the card that predictions are for, and what its speed rests on
    study.journal       Optuna's state, the record of truth
    trials/0003/        train_config.json, reports.jsonl, checkpoint/, adapter/ (the engine's),
                        system.jsonl, result.json, error.txt; of a warm clone also start/, the
                        adapter that it began with
    timeline.jsonl      when each trial held which slot
    commands/           commands of `python -m sweep.control` that the driver has not taken yet
    best/               the winning adapter, ready to load
    final-seeds/        the best trials trained again with other seeds: a sweep folder of its own
    examples.json       answers of base model and winner to a few evaluation samples
    leaderboard.md/.json, report.html, driver.log, ray/ (Tune's own files, never read again)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from engine.command_answers import DataAccount
from engine.config.parsing import load_json, parse_dataclass, to_json
from engine.config.trial import TRAIN_CONFIG, TrainConfig
from engine.errors import InputError, StorageError
from engine.system.file_lock import FileLock, is_held
from engine.system.files import write_text
from engine.system.user_path import user_path
from engine.trial_report import REPORTS, TrialReport, read_reports
from sweep.config.resume_changes import parse_recorded_config
from sweep.config.sweep import SweepConfig
from sweep.folder.flush import replace_text

START = "start"
ACCOUNTS = "accounts"  # key in data.json
PROBED_S = 1.0  # somebody who asks whether a driver works here may be in its way for a moment


class SweepFolder:
    """Name the paths of one sweep, and read and write its files atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "sweep_config.json"
        self.data_file = path / "data.json"
        self.card_file = path / "card.txt"
        self.journal = path / "study.journal"
        self.timeline = path / "timeline.jsonl"
        self.best = path / "best"
        self.final_seeds = path / "final-seeds"
        self.examples_file = path / "examples.json"
        self.log = path / "driver.log"
        self.ray = path / "ray"
        self.lock_file = path / ".lock"
        # while this file exists, running trials save and end (sweep/execution/interruption.py)
        self.stop_file = path / ".stop"
        self.commands = path / "commands"

    @classmethod
    def create(cls, config: SweepConfig, now: datetime) -> SweepFolder:
        """Create a new folder under sweep.output_dir.

        A name taken in the same second gets a number. Raises InputError if the folder cannot be
        written.
        """
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
                raise InputError("sweep.output_dir", str(parent), f"must be a folder with free space ({error})") from None
            return folder
        raise InputError("sweep.output_dir", str(parent), f"already holds 99 folders named {stem}")

    @property
    def started_s(self) -> float:
        """Return when the sweep began, in Unix seconds.

        The first driver makes the lock file, and nothing is ever written to it.
        """
        return self.lock_file.stat().st_mtime

    @classmethod
    def open(cls, path: str | Path, field: str = "resume") -> SweepFolder:
        """Open an existing sweep folder. Raises InputError about `field` if the path is none."""
        folder = cls(user_path(path))
        if not folder.config_file.is_file():
            raise InputError(field, str(path), "must be a sweep folder (one with a sweep_config.json)")
        folder._refuse_links_out(field)
        return folder

    def _refuse_links_out(self, field: str) -> None:
        """Raise InputError about `field` if a link leads out of the folder.

        A folder from someone else may hold links, and the sweep must not write or remove through
        them.
        """
        inside = self.path.resolve()
        for parent, folders, files in os.walk(self.path):
            for name in (*folders, *files):
                entry = Path(parent, name)
                if entry.is_symlink() and not entry.resolve().is_relative_to(inside):
                    raise InputError(field, str(entry), f"must not link out of the sweep folder, to {os.readlink(entry)}")

    def write_config(self, config: SweepConfig) -> None:
        """Write the config with its keys in order.

        The order of `space` is that of dimensions and choices, which Optuna refuses to see changed.
        """
        write_text(self.config_file, json.dumps(config.model_dump(mode="json"), indent=2) + "\n")

    def read_config(self) -> SweepConfig:
        return parse_recorded_config(load_json(self.config_file))

    def write_data(self, data: dict[str, Any], accounts: Iterable[DataAccount] = ()) -> None:
        """Write the digests of the samples and base model that all trials share.

        accounts: what became of the rows of both data sets at each length.
        """
        text = json.dumps({**data, ACCOUNTS: [asdict(account) for account in accounts]}, indent=2, sort_keys=True)
        write_text(self.data_file, text + "\n")

    def read_data(self) -> dict[str, Any] | None:
        """Return these digests, or None if the folder has none yet."""
        found = load_json(self.data_file) if self.data_file.is_file() else None
        return {name: value for name, value in found.items() if name != ACCOUNTS} if isinstance(found, dict) else found

    def read_accounts(self) -> list[DataAccount]:
        """Return what became of the data; empty for a sweep that wrote nothing about it."""
        found = load_json(self.data_file) if self.data_file.is_file() else None
        known = found.get(ACCOUNTS, []) if isinstance(found, dict) else []
        if not isinstance(known, list):
            raise InputError(f"data.json.{ACCOUNTS}", known, "must be a list")
        return [parse_dataclass(DataAccount, values, f"data.json.{ACCOUNTS}.{i}") for i, values in enumerate(known)]

    def write_card(self, line: str) -> None:
        """Write the line about the card that predictions are for."""
        write_text(self.card_file, line + "\n")

    def read_card(self) -> str | None:
        """Return this line, or None for a sweep that predicted nothing."""
        return self.card_file.read_text(encoding="utf-8").strip() if self.card_file.is_file() else None

    def write_examples(self, examples: dict[str, Any]) -> None:
        """Write the example answers.

        trial: the winner. examples: prompt, expected, base and adapter of each. error: in one line,
        why there are none.
        """
        write_text(self.examples_file, json.dumps(examples, indent=2, ensure_ascii=False) + "\n")

    def read_examples(self) -> dict[str, Any] | None:
        """Return the example answers, or None if the sweep has not ended or was asked for none."""
        if not self.examples_file.is_file():
            return None
        found = load_json(self.examples_file)
        for example in found.get("examples", []):
            if "reference" in example:  # the key in sweeps before version 0.2
                example["expected"] = example.pop("reference")
        return found

    def trial(self, number: int) -> Path:
        """Return the folder of one trial, such as trials/0003."""
        return self.path / "trials" / f"{number:04d}"

    def start(self, number: int) -> Path:
        """Return the folder of the adapter that a warm clone begins with."""
        return self.trial(number) / START

    def write_train_config(self, number: int, config: TrainConfig) -> None:
        self.trial(number).mkdir(parents=True, exist_ok=True)
        replace_text(self.trial(number) / TRAIN_CONFIG, to_json(config) + "\n")

    def write_result(self, number: int, result: dict[str, Any]) -> None:
        replace_text(self.trial(number) / "result.json", json.dumps(result, indent=2, sort_keys=True) + "\n")

    def write_reports(self, number: int, reports: list[TrialReport]) -> None:
        """Write the reports of a trial that another sweep trained. The engine writes all others."""
        replace_text(self.trial(number) / REPORTS, "".join(json.dumps(report.to_dict()) + "\n" for report in reports))

    def has_result(self, number: int) -> bool:
        return (self.trial(number) / "result.json").is_file()

    def drop_result(self, number: int) -> None:
        """Remove the result of a trial that goes on."""
        (self.trial(number) / "result.json").unlink(missing_ok=True)

    def reports(self, number: int) -> list[TrialReport]:
        """Return the trial's reports, ascending by rung. Empty if it has none yet."""
        return read_reports(self.trial(number))

    def check_room(self) -> None:
        """Raise StorageError if the disk is full. The check writes a page and removes it."""
        probe = self.path / ".room"
        write_text(probe, "." * 4096)
        probe.unlink()

    def is_driven(self) -> bool:
        """Return whether a driver works in the folder, on this machine or on another node of a shared disk."""
        return is_held(self.lock_file)

    @contextmanager
    def lock(self, field: str = "resume") -> Iterator[None]:
        """Hold the folder for this process. Raises InputError about `field` if another driver has it."""
        lock = FileLock(self.lock_file)
        if not lock.acquire(patience_s=PROBED_S):
            allowed = "another driver works in this sweep folder; wait until it ends, or stop it"
            if lock.holder is not None:  # it may be of another machine, which no one can ask
                allowed += f"; if it has died on another machine, remove {lock.holder}"
            raise InputError(field, str(self.path), allowed)
        try:
            yield
        finally:
            lock.release()
