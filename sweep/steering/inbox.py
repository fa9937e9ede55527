"""Carry commands from a user's process to the driver, as files in the sweep folder.

The folder is what both share, on one machine or many: no port is open and no password is needed.
Who may write into the folder may steer the sweep. A file is whole or not there at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from engine.config.parsing import load_json
from engine.errors import InputError
from engine.system.files import write_text
from sweep.folder.sweep_folder import SweepFolder
from sweep.steering.command import Command

SUFFIX = ".json"
LARGEST_BYTES = 1_000_000


def new_name(now_ns: int) -> str:
    """Return a command's id. Names sort by the time of sending."""
    return f"{now_ns:020d}-{os.getpid()}-{os.urandom(4).hex()}"


def send(folder: SweepFolder, command: Command) -> Path:
    """Leave the command for the driver. Returns the file, which is gone once the journal has it."""
    folder.commands.mkdir(exist_ok=True)
    file = folder.commands / f"{command.id}{SUFFIX}"
    write_text(file, json.dumps(command.to_dict()) + "\n")
    return file


def unread(folder: SweepFolder) -> Iterator[tuple[Path, Command | str]]:
    """Yield the files that wait, oldest first, each with its command, or with why it holds none."""
    for file in _files(folder):
        try:
            if file.stat().st_size > LARGEST_BYTES:
                raise ValueError("is too large for a command")
            command = Command.from_dict(load_json(file))
            if f"{command.id}{SUFFIX}" != file.name:
                raise ValueError("holds a command of another name")
        except (InputError, ValueError, RecursionError) as error:
            yield file, f"{file.name}: {error}"
        except FileNotFoundError:  # its sender took it back
            continue
        else:
            yield file, command


def _files(folder: SweepFolder) -> list[Path]:
    """Return the files, no links and no half-written ones."""
    try:
        with os.scandir(folder.commands) as entries:
            names = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder.commands / name for name in sorted(names) if name.endswith(SUFFIX) and not name.startswith(".")]
