"""Find and remove what a trial needs only to go on, once it can go on no more."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from engine.system.files import every_form
from engine.trial_report import CHECKPOINT, PREVIOUS_CHECKPOINT
from sweep.folder.flush import remove_soon
from sweep.folder.sweep_folder import START
from sweep.trials.record import CONTENDERS, GOING_ON, TrialRecord


def checkpoints(trial_folder: Path) -> list[Path]:
    """Return the trial's checkpoints, those that a kill left half written included."""
    places = (*every_form(trial_folder / CHECKPOINT), trial_folder / PREVIOUS_CHECKPOINT)
    return [place for place in places if os.path.lexists(place)]


def drop_if_ended(record: TrialRecord) -> None:
    """Remove a trial's checkpoints in the background, unless it may go on, and a start that no winner will name.

    Call it once the journal has the end: a kill before the removal leaves them, and the next driver
    removes them.
    """
    if record.outcome not in GOING_ON:
        for place in checkpoints(Path(record.folder)):
            remove_soon(place)
    for place in unused_starts(Path(record.folder), record):
        remove_soon(place)


def unused_starts(trial_folder: Path, record: TrialRecord) -> list[Path]:
    """Return the adapter that the trial began with, if there is one and neither the trial nor `best/` will name it.

    A kill may leave one, also half written, before the journal has its trial. Another trial then has
    the number.
    """
    is_used = record.warm is not None and record.outcome in (*GOING_ON, *CONTENDERS)
    return [] if is_used else [place for place in every_form(trial_folder / START) if place.is_dir() and not place.is_symlink()]


def num_starts(sweep_folder: Path) -> int:
    """Return how many warm clones of the sweep still have the adapter that they began with."""
    return sum(place.is_dir() and not place.is_symlink() for place in (sweep_folder / "trials").glob(f"*/{START}"))


def freed_bytes(folders: Iterable[Path]) -> int:
    """Return the bytes that the disk gets back if these folders are removed.

    A file that has another name elsewhere, such as a checkpoint's adapter in adapter/, frees none.
    """
    inside: dict[tuple[int, int], list[int]] = {}  # file -> names among these folders, names in all, bytes
    for folder in folders:
        for place, _, names in os.walk(folder):
            for name in names:
                with suppress(FileNotFoundError):  # a running trial's files come and go
                    found = os.lstat(os.path.join(place, name))
                    known = inside.setdefault((found.st_dev, found.st_ino), [0, found.st_nlink, found.st_size])
                    known[0] += 1
    return sum(size for num_here, num_names, size in inside.values() if num_here >= num_names)
