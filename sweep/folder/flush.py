"""Flush files to the disk in the background, so that the driver does not wait for it.

A flush took 9 ms. A decision may take 10 ms, and a trial needs ten flushes.

A written file survives a kill at once, flushed or not. A flush protects against a power cut, which
may thus undo the decisions of some milliseconds. Nothing depends on those yet: a trial's first
checkpoint comes later. The worker flushes a report in the trial's folder before the driver hears of
it.
"""

from __future__ import annotations

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# the thread starts with the first file, and the process waits for it before it ends
_pool = ThreadPoolExecutor(1, "disk")
_waiting: set[Path] = set()
_lock = threading.Lock()


def flush_soon(path: Path) -> None:
    """Flush the file in the background.

    A second request before the flush begins adds no second flush.
    """
    with _lock:
        if path in _waiting:
            return
        _waiting.add(path)
    _pool.submit(_flush, path)


def wait_until_flushed() -> None:
    """Return once every file requested so far is on the disk."""
    _pool.submit(lambda: None).result()


def remove_soon(folder: Path) -> None:
    """Remove the folder in the background, once every file requested so far is on the disk.

    A power cut may then keep the folder, but never lose the journal's reason to remove it.
    """
    _pool.submit(shutil.rmtree, folder, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Replace the file by `text` in one rename, and flush it in the background."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    flush_soon(path)


def _flush(path: Path) -> None:
    with _lock:
        _waiting.discard(path)
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # the file was removed meanwhile, with its folder
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
