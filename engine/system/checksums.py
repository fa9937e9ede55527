"""Checksums of a folder's files, so that a damaged file is noticed before anyone believes it.

Each file has one SHA-256 for every 64 MiB, which threads compute side by side. A file whose size,
times and inode are those of the last look is not read again by the same process.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.system.files import sync

CHECKSUMS = "checksums.json"
CHUNK_BYTES = 64 * 2**20
MAX_THREADS = 8
_verified: dict[str, tuple[tuple[int, ...], ...]] = {}  # folder -> stamps of its files when they were last right


def write_checksums(folder: Path) -> None:
    """Write checksums.json for the files that `folder` holds, and have all of them on the disk."""
    files = _files(folder)
    (folder / CHECKSUMS).write_text(json.dumps(content_digests(folder, files), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for path in (*(folder / name for name in files), folder / CHECKSUMS, folder):
        sync(path)


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with `folder`, naming the file; None if every file is as it was written."""
    if folder.is_symlink():
        return f"{folder} is a link"
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    for name, path in found.items():
        if path.is_symlink():
            return f"{name} is a link"
    stamps = tuple(stamp(path) for path in found.values() if path.is_file())
    if _verified.get(str(folder)) == stamps:
        return None
    if CHECKSUMS not in found:
        return f"it has no {CHECKSUMS}, so an older version made it"
    try:
        wanted = json.loads(found[CHECKSUMS].read_text(encoding="utf-8"))
        actual = content_digests(folder, _files(folder))
    except (OSError, ValueError, RecursionError):
        return f"{CHECKSUMS} cannot be read"
    if not isinstance(wanted, dict) or wanted.keys() != actual.keys():
        return f"its files are not those of {CHECKSUMS}"
    damaged = [name for name, digests in actual.items() if wanted[name] != digests]
    if damaged:
        return f"{damaged[0]} has changed since it was written"
    _verified[str(folder)] = stamps
    return None


def _files(folder: Path) -> list[str]:
    """Return the names of all files below `folder`, without the checksums."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != CHECKSUMS)


def content_digests(folder: Path, names: list[str]) -> dict[str, list[str]]:
    """Return file -> the digests of its chunks, found on several threads; a file without content has one."""
    chunks = [(name, i) for name in names for i in range(max(1, -(-(folder / name).stat().st_size // CHUNK_BYTES)))]
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda chunk: _digest(folder / chunk[0], chunk[1]), chunks))
    found: dict[str, list[str]] = {name: [] for name in names}
    for (name, _), digest in zip(chunks, digests):
        found[name].append(digest)
    return found


def _digest(path: Path, chunk: int) -> str:
    state, left = hashlib.sha256(), CHUNK_BYTES
    with path.open("rb") as handle:
        handle.seek(chunk * CHUNK_BYTES)
        while left and (piece := handle.read(min(left, 2**20))):
            state.update(piece)
            left -= len(piece)
    return state.hexdigest()


def stamp(path: Path) -> tuple[int, ...]:
    """Return what changes with every write: no program can set the ctime back."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
