"""Quantise the base model once per node: the first process saves it, all others read it.

transformers saves and reads the packed weights as safetensors. The files are memory-mapped, so the
next process finds in the page cache what the first has read. For an 8B model each process reads 5.5
GiB instead of reading and quantising 16 GB.

The folder is in the cache (engine/system/shared_cache.py), under a name made from everything its
bits depend on. If the disk cannot hold it, each process quantises for itself and prints one
warning. Its checksums are verified before it is read, on several threads.
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

from engine.errors import InputError, StorageError, first_line
from engine.quant.frozen_linear import odd_linears
from engine.system.files import storage_fault, writing
from engine.system.shared_cache import CACHE_VARIABLE, build_once, cache_root
from engine.units import GIB

VERSION = 2  # of the saved folder's content
QUOTA_VARIABLE, QUOTA_GIB = "QLORA_SWEEP_CACHE_GIB", 64.0
MIN_FREE = 1.1  # free disk space needed, as a multiple of the bytes to save
PREFIX = "nf4-"
Loaded = tuple[Any, dict[str, Any]]
"""A model, and the loading report of transformers."""


def load_packed(folder: Path, settings: dict[str, Any], quantise: Callable[[], Loaded], read: Callable[[Path], Loaded]) -> Loaded:
    """Return the quantised model of `folder`, from the cache if it is there.

    settings: everything but the files that the packed bits depend on, as plain data. quantise:
    loads and quantises the original. read: loads a folder that save_pretrained wrote.
    """
    made: list[Loaded] = []

    def build(target: Path) -> None:
        made.append(quantise())
        _save(made[0][0], target)

    try:
        packed = build_once(PREFIX + key(folder, settings), build)
    except (InputError, StorageError) as error:
        if isinstance(error, InputError) and error.field not in (CACHE_VARIABLE, QUOTA_VARIABLE):
            raise
        print(f"WARNING: cannot save the quantised model, so each process quantises again: {error}", file=sys.stderr)
        return made[0] if made else quantise()
    if made:
        return made[0]
    try:
        os.utime(packed)  # `_make_room` removes the folder that was used longest ago first
        found = read(packed)
    except (InputError, FileNotFoundError) as error:
        print(f"WARNING: cannot read {packed}, so it is quantised again ({error})", file=sys.stderr)
        shutil.rmtree(packed, ignore_errors=True)
        return load_packed(folder, settings, quantise, read) if not packed.exists() else quantise()
    return found if not odd_linears(found[0]) else quantise()  # reading may rename, as it would an old checkpoint's weights


def key(folder: Path, settings: dict[str, Any]) -> str:
    """Return 24 hex digits that name the packed model.

    They depend on the settings, the libraries, and the names, sizes and times of the folder's
    weights and config. Reading the contents would cost the time that the cache saves. The ctime
    catches every change, because no program can set it back.
    """
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
        try:
            model.save_pretrained(folder, save_original_format=False)
        except Exception as error:  # some families store weights in another form, into which packed ones cannot be brought
            if storage_fault(error) is not None:
                raise
            raise StorageError(f"transformers cannot write it ({type(error).__name__}: {first_line(error)})") from error


def _make_room(num_bytes: int) -> None:
    """Remove the folders used longest ago until `num_bytes` more fit in the quota.

    A process that has mapped a removed folder keeps it until it ends. StorageError if quota or disk
    is too small.
    """
    root, quota_gib = cache_root(), _quota_gib()
    free = shutil.disk_usage(root).free
    if num_bytes > quota_gib * GIB:
        raise StorageError(f"it needs {num_bytes / GIB:.1f} GiB, and {QUOTA_VARIABLE} allows {quota_gib:g}; raise it")
    if free < MIN_FREE * num_bytes:
        raise StorageError(f"it needs {num_bytes / GIB:.1f} GiB, and {root} has {free / GIB:.1f} GiB free")
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
        raise InputError(QUOTA_VARIABLE, text, "must be a number of GiB, 0 or more")
    return gib
