"""Try the folder that sweep folders are made in, before anything costs time or money."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from engine.errors import InputError, first_line

FIELD = "sweep.output_dir"
ROOM_BYTES = 2**20


def check_output_folder(path: Path) -> None:
    """Raise InputError if no sweep folder can be made and filled in `path`. Nothing stays behind."""
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(ROOM_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(FIELD, str(path), f"must be a writable folder with free space ({_reason(error)})") from None
    finally:
        for folder in missing:  # deepest first
            with suppress(OSError):  # someone has put something into it meanwhile
                folder.rmdir()


def _reason(error: OSError) -> str:
    return error.strerror or first_line(error)
