"""Folders made once and shared by all processes of this machine: a file lock, a temporary folder, one atomic rename.

Not a general cache: nothing expires. A builder whose output changes must change its name, which carries a version.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from engine.errors import InputError
from engine.system.file_lock import FileLock

CACHE_VARIABLE = "QLORA_SWEEP_CACHE"


def cache_root() -> Path:
    """$QLORA_SWEEP_CACHE, or ~/.cache/qlora-sweep; not created here."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given).expanduser().absolute() if given else Path.home() / ".cache" / "qlora-sweep"


def build_once(name: str, builder: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, filled by `builder(empty_folder)` if it is not there yet.

    A second process waits for the first (flock: the kernel frees it even after SIGKILL). The folder appears under its name only
    when whole; what a killed build left is removed by the next. InputError where the cache cannot be written.
    """
    root = cache_root()
    final = root / name
    if final.is_dir():
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock").held():
            if not final.is_dir():
                _build(root, name, builder)
    except OSError as error:
        if error.filename is None or not str(error.filename).startswith(str(root)):
            raise
        raise InputError(CACHE_VARIABLE, str(root), f"must be a writable folder with free space ({error})") from None
    return final


def _build(root: Path, name: str, builder: Callable[[Path], None]) -> None:
    for leftover in root.glob(f".{name}.building-*"):  # safe: we hold the lock, so its builder is dead
        shutil.rmtree(leftover)
    building = root / f".{name}.building-{os.getpid()}"
    building.mkdir()
    try:
        builder(building)
        building.rename(root / name)
    finally:
        shutil.rmtree(building, ignore_errors=True)
