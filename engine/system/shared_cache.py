"""Build folders once and share them between all processes of the machine.

A file lock, a temporary folder and one atomic rename make this safe. What is `<kind>-<digest>` goes
if many of its kind are newer; nothing else expires. A builder whose output changes must use another
name, so names include a version.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.errors import InputError, StorageError
from engine.system.checksums import find_damage, write_checksums
from engine.system.file_lock import FileLock
from engine.system.files import follow_umask, require_home, sync
from engine.system.user_path import user_path

CACHE_VARIABLE = "QLORA_SWEEP_CACHE"
REMEMBERED, MOST = "value.json", 256


def cache_root() -> Path:
    """Return $QLORA_SWEEP_CACHE, or ~/.cache/qlora-sweep; the folder may not exist yet."""
    given = os.environ.get(CACHE_VARIABLE)
    return user_path(given).absolute() if given else require_home() / ".cache" / "qlora-sweep"


def build_once(name: str, builder: Callable[[Path], None]) -> Path:
    """Return the cache's folder `name`, filled by `builder(empty_folder)` if it is not there yet.

    A second process waits for the first; the kernel frees the flock even after SIGKILL. The folder
    gets its name only when it is whole, on the disk, and described by checksums. A folder that has
    changed since then is named in a warning, removed and built again. The next build removes the
    leftovers of a killed one. InputError if the cache cannot be written.
    """
    root = cache_root()
    final = root / name
    if final.is_dir() and find_damage(final) is None:
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # it may name a folder above the root
        raise _unusable(root, error) from None
    try:
        with FileLock(root / f".{name}.lock").held():
            if final.is_dir() or final.is_symlink():
                _remove_damaged(final)
            if not final.is_dir():
                _build(root, name, builder)
    except OSError as error:
        if error.filename is None or not str(error.filename).startswith(str(root)):
            raise
        raise _unusable(root, error) from None
    return final


def recall(name: str) -> dict[str, Any] | None:
    """Return what `remembered` keeps under this name, or None."""
    folder = cache_root() / name
    try:
        known = json.loads((folder / REMEMBERED).read_text(encoding="utf-8")) if find_damage(folder) is None else None
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) else None


def remembered(name: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `find` returned, as JSON keeps it, when it was first called for this name on this machine.

    Names are `<kind>-<digest>`, and the newest MOST of a kind are kept. A cache that cannot be written costs only time.
    """
    if (known := recall(name)) is not None:
        return known
    found = find()
    with contextlib.suppress(InputError, StorageError, OSError):
        build_once(name, lambda folder: _write(folder, found))
        forget_old(name.partition("-")[0], MOST)
    return json.loads(json.dumps(found))


def forget_old(kind: str, most: int) -> None:
    """Remove all but the newest folders `<kind>-*`, as far as this user may. Other processes may do so at the same time."""
    known = []
    for path in cache_root().glob(f"{kind}-*"):
        with contextlib.suppress(OSError):
            known.append((path.stat().st_mtime, path))
    for _, path in sorted(known)[:-most]:
        shutil.rmtree(path, ignore_errors=True)


def _write(folder: Path, value: dict[str, Any]) -> None:
    (folder / REMEMBERED).write_text(json.dumps(value), encoding="utf-8")


def _unusable(root: Path, error: OSError) -> InputError:
    return InputError(CACHE_VARIABLE, str(root), f"must be a writable folder with free space ({error})")


def _remove_damaged(final: Path) -> None:
    """Remove the folder if it is damaged; another process may have built it again meanwhile."""
    damage = find_damage(final)
    if damage is None:
        return
    print(f"WARNING: {final} is damaged ({damage}); it is removed and made again", file=sys.stderr)
    if final.is_symlink():
        final.unlink()
    else:
        shutil.rmtree(final)


def _build(root: Path, name: str, builder: Callable[[Path], None]) -> None:
    for leftover in root.glob(f".{name}.building-*"):  # we hold the lock, so its builder is dead
        shutil.rmtree(leftover)
    building = root / f".{name}.building-{os.getpid()}"
    building.mkdir()
    try:
        builder(building)
        follow_umask(building)
        write_checksums(building)
        building.rename(root / name)
        sync(root)
    finally:
        shutil.rmtree(building, ignore_errors=True)
