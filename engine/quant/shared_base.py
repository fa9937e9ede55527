"""The quantised base once per node: the first process that needs it quantises and saves it, all others read the packed weights.

Saved and read by transformers itself, as safetensors, which are mapped: what one process has read, the next finds in the page
cache. An 8B model is 5.5 GiB then instead of 16 GB to read and to quantise. It lies in the cache folder (engine/cache.py) under a
name made of everything its bits depend on. Where the disk does not take it, each process quantises for itself, and says so in
one line. Given up: checksums of what is read, 3 s for 5.5 GiB at every load.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.errors import InputError, StorageError
from engine.system.files import sync, writing
from engine.system.shared_cache import CACHE_VARIABLE, build_once, cache_root
from engine.units import GIB

VERSION = 1  # of what is saved
QUOTA_VARIABLE, QUOTA_GIB = "QLORA_SWEEP_CACHE_GIB", 64.0
MIN_FREE = 1.1  # times what is to be saved
PREFIX = "nf4-"
Loaded = tuple[Any, dict[str, Any]]
"""A model, and what transformers says of the loading."""


def load_packed(folder: Path, settings: dict[str, Any], quantise: Callable[[], Loaded], read: Callable[[Path], Loaded]) -> Loaded:
    """The model of `folder`, quantised. settings: what its packed bits depend on beside the files, as plain data. quantise: loads
    and quantises the original; read: loads a folder that save_pretrained wrote."""
    made: list[Loaded] = []

    def build(target: Path) -> None:
        made.append(quantise())
        _save(made[0][0], target)

    try:
        packed = build_once(PREFIX + key(folder, settings), build)
    except (InputError, StorageError) as error:
        if isinstance(error, InputError) and error.field not in (CACHE_VARIABLE, QUOTA_VARIABLE):
            raise
        print(f"WARNING: the quantised model is not kept for other processes: {error}", file=sys.stderr)
        return made[0] if made else quantise()
    if made:
        return made[0]
    try:
        os.utime(packed)  # the one used longest ago goes first
        return read(packed)
    except (InputError, FileNotFoundError) as error:
        print(f"WARNING: {packed} cannot be read and is made anew ({error})", file=sys.stderr)
        shutil.rmtree(packed, ignore_errors=True)
        return load_packed(folder, settings, quantise, read) if not packed.exists() else quantise()


def key(folder: Path, settings: dict[str, Any]) -> str:
    """24 hex digits of the settings, the libraries, and the weights and config of the folder: names, sizes, times. Contents are
    not read: that is what is to be saved. The time of the last change of any kind (ctime) is what no program can set back."""
    files = sorted(path for path in folder.iterdir() if path.name == "config.json" or path.suffix == ".safetensors")
    found = [(path.name, str(path.resolve()), *_stamp(path)) for path in files]
    libraries = {name: version(name) for name in ("bitsandbytes", "torch", "transformers")}
    return hashlib.sha256(json.dumps([VERSION, settings, libraries, found], sort_keys=True).encode()).hexdigest()[:24]


def _stamp(path: Path) -> tuple[int, int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _save(model: Any, folder: Path) -> None:
    num_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    _make_room(num_bytes)
    with writing(folder):
        model.save_pretrained(folder)
        for path in folder.iterdir():
            sync(path)


def _make_room(num_bytes: int) -> None:
    """Keep to the quota: what was used longest ago is removed. Processes that have it mapped keep it until they end."""
    root, quota_gib = cache_root(), _quota_gib()
    free = shutil.disk_usage(root).free
    if num_bytes > quota_gib * GIB:
        raise StorageError(f"it takes {num_bytes / GIB:.1f} GiB, and {QUOTA_VARIABLE} allows {quota_gib:g}")
    if free < MIN_FREE * num_bytes:
        raise StorageError(f"it takes {num_bytes / GIB:.1f} GiB, and {root} has {free / GIB:.1f} GiB free")
    kept = sorted((path for path in root.glob(f"{PREFIX}*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in kept}
    while kept and sum(sizes.values()) + num_bytes > quota_gib * GIB:
        oldest = kept.pop(0)
        del sizes[oldest]
        shutil.rmtree(oldest, ignore_errors=True)


def _quota_gib() -> float:
    text = os.environ.get(QUOTA_VARIABLE, str(QUOTA_GIB))
    try:
        gib = float(text)
    except ValueError:
        gib = -1.0
    if not gib >= 0.0:
        raise InputError(QUOTA_VARIABLE, text, "must be a number of GiB from 0")
    return gib
