"""Leave notes in a trial's folder: a process trains here, must leave, or was told to end."""

from __future__ import annotations

from pathlib import Path

# files in a trial's folder
TRAINING = ".training"  # the process has loaded the model, so it may have something to save
LEAVE = ".leave"  # the driver asks the process to save the trial and end it
TERMINATED = ".terminated"  # the process was asked to end, which is not the trial's fault


def note_terminated(trial_folder: Path) -> None:
    """Tell the driver, which sees only that the process is gone, that it was asked to end."""
    (trial_folder / TERMINATED).touch()


def is_training(trial_folder: Path) -> bool:
    """Return whether the trial may have something to save."""
    return (trial_folder / TRAINING).exists()


def was_terminated(trial_folder: Path) -> bool:
    """Return whether the trial's last process was asked to end, and ended in order.

    The call removes the note, so it returns True only once.
    """
    note = trial_folder / TERMINATED
    was = note.exists()
    note.unlink(missing_ok=True)
    return was
