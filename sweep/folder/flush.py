"""Has files flushed to the disk behind the driver's back: a flush took 9 ms where a decision may take 10, and a trial needs ten.

What was written survives a kill at once, flushed or not. A flush is for a power cut, which may thus take back the decisions of
some milliseconds. Nothing depends on those yet: a trial's first checkpoint comes later, and a report is in the trial's folder,
flushed by the worker, before the driver hears of it.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_pool = ThreadPoolExecutor(1, "disk")  # its thread starts with the first file, and is waited for when the process ends
_waiting: set[Path] = set()
_lock = threading.Lock()


def flush_soon(path: Path) -> None:
    """Flush the file in the background; asked for twice before it begins, once is enough."""
    with _lock:
        if path in _waiting:
            return
        _waiting.add(path)
    _pool.submit(_flush, path)


def wait_until_flushed() -> None:
    """Come back once everything asked for so far is on the disk."""
    _pool.submit(lambda: None).result()


def replace_text(path: Path, text: str) -> None:
    """Replace the file by `text` in one rename, flushed soon."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    flush_soon(path)


def _flush(path: Path) -> None:
    with _lock:
        _waiting.discard(path)
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # removed since, with its folder
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
