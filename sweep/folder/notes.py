"""Notes in a trial's folder: a process trains here, a process was told to end."""

from __future__ import annotations

from pathlib import Path

TRAINING = ".training"  # in a trial's folder: its process has loaded the model, so that there may be something to save
TERMINATED = ".terminated"  # in a trial's folder: its process was asked to end, and it is no fault of the trial


def note_terminated(trial_folder: Path) -> None:
    """For the driver, which sees only that the process is gone."""
    (trial_folder / TERMINATED).touch()


def is_training(trial_folder: Path) -> bool:
    """Whether the trial may have something to save."""
    return (trial_folder / TRAINING).exists()


def was_terminated(trial_folder: Path) -> bool:
    """Whether the last process of the trial was asked to end, and did so in order; said once."""
    note = trial_folder / TERMINATED
    was = note.exists()
    note.unlink(missing_ok=True)
    return was
