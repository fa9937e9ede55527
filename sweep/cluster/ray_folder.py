"""Find a folder for the files of a Ray that the sweep starts itself.

Ray makes sockets below it, whose paths the kernel limits to 107 bytes. The TMPDIR of a Slurm job is
often too long.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from engine.errors import InputError

SOCKET = "/ray/session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store"
MAX_BYTES = 107 - len(SOCKET)
USUAL = ("/tmp", "/var/tmp", "/dev/shm")
PROBE_BYTES = 2**16
SHARED_MEMORY = Path("/dev/shm")
NAMES = ("RAY_TMPDIR", "TMPDIR")


def settle_ray_folder(environment: MutableMapping[str, str]) -> str | None:
    """Set RAY_TMPDIR to a folder that works, where the folder that Ray would take does not.

    Returns a line that says so, or None. Raises InputError if no folder works.
    """
    if not os.access(SHARED_MEMORY, os.W_OK | os.X_OK):
        raise InputError(str(SHARED_MEMORY), "missing", "must be a writable folder, because Ray shares memory there")
    name = next((name for name in NAMES if environment.get(name)), None)
    given = environment[name] if name else USUAL[0]
    fault = _fault(given)
    if fault is None:
        return None
    for folder in USUAL:
        if _fault(folder) is None:
            environment["RAY_TMPDIR"] = folder
            return f"{name or given} {fault}, so Ray's files are in {folder}/ray"
    allowed = f"{fault}; set RAY_TMPDIR to a writable folder of at most {MAX_BYTES} bytes, with free space"
    raise InputError(name or "RAY_TMPDIR", given, allowed)


def _fault(folder: str) -> str | None:
    """Return why Ray cannot use the folder, or None."""
    if len(os.fsencode(folder)) > MAX_BYTES:
        return f"is too long for Ray's sockets ({len(os.fsencode(folder))} bytes, at most {MAX_BYTES})"
    if not os.path.isabs(folder) or not os.path.isdir(folder):
        return "is no folder"
    made = Path(folder, "ray")
    try:
        with tempfile.TemporaryFile(dir=made if made.is_dir() else folder) as file:
            file.write(bytes(PROBE_BYTES))
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return None
