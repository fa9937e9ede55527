"""Write files and folders so that a crash leaves the old one or the new one, never a torn one.

A full, read-only or failing disk raises StorageError, from any library, and the old file or folder
stays. No torch.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from engine.errors import InputError, StorageError

FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE)

NO_HOME = "this user has no home folder, where libraries keep their files; set HOME to a folder that only you can write"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of a full, read-only or failing disk into a StorageError that names `path`."""
    try:
        yield
    except Exception as error:
        number = storage_fault(error)
        if number is None:
            raise
        raise StorageError(f"{path} cannot be written: {os.strerror(number)}") from error


def storage_fault(error: BaseException) -> int | None:
    """Return the errno if the error means that the disk accepts no data; None for other errors."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, OSError) and number is None and re.search(r"\d+ requested and \d+ written", str(error)):
        return errno.ENOSPC  # numpy's message for a short write has no errno
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])  # Rust's message, from safetensors and tokenizers
    return number if number in FAULTS else None


def write_text(path: Path, text: str) -> None:
    """Replace the content of the file `path` by `text`, atomically and flushed to disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with temporary.open("w", encoding="utf-8") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_folder(path: Path, fill: Callable[[Path], None], *, previous: Path | None = None) -> None:
    """Replace the folder `path` by the files that `fill(empty_folder)` writes.

    previous: a path to keep the old folder at; None removes it.
    """
    stage_folder(path, fill)
    place_folder(path, previous=previous)
    drop_outdated(path)


def stage_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Write the files of `fill(empty_folder)` beside the folder `path`, flushed, for `place_folder`.

    May run in a thread, as long as no other one writes the same folder.
    """
    with writing(path):
        settle(path)
        drop_outdated(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = staged(path)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        with _dropped_on_fault(temporary):
            fill(temporary)
            follow_umask(temporary)
            for file in temporary.rglob("*"):
                sync(file)


def write_digested(folder: Path, makers: Mapping[str, Callable[[], bytes | memoryview]]) -> dict[str, str]:
    """Write what each maker returns as a file of that name, flushed; return the SHA-256 digests in hex, by name.

    The makers run here, in turn. Meanwhile the content before is written and its digest made, each in a thread.
    """
    with ThreadPoolExecutor(2 * len(makers), thread_name_prefix="writing") as pool:
        digests, written = {}, []
        for name, make in makers.items():
            content = make()
            written.append(pool.submit(_write_flushed, folder / name, content))
            digests[name] = pool.submit(_sha256, content)
        for one in written:
            one.result()
        return {name: digest.result() for name, digest in digests.items()}


def _write_flushed(path: Path, content: bytes | memoryview) -> None:
    path.write_bytes(content)
    sync(path)


def _sha256(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def place_folder(path: Path, texts: Mapping[str, str] | None = None, *, previous: Path | None = None) -> None:
    """Replace the folder `path` by the staged one.

    texts: further files, by name. previous: a path to keep the old folder at; None removes it. A
    rename cannot replace a non-empty folder, so the old one is renamed first. After a crash between
    the two renames, `settle` brings it back. The one kept before waits for `drop_outdated`.
    """
    temporary, aside = staged(path), _aside(path)
    with writing(path):
        with _dropped_on_fault(temporary):
            for name, text in (texts or {}).items():
                (temporary / name).write_text(text, encoding="utf-8")
                sync(temporary / name)
            try:
                if path.exists():
                    path.rename(aside)
                temporary.rename(path)
                sync(path.parent)
            except BaseException:
                if aside.exists() and not path.exists():
                    aside.rename(path)
                raise
        if previous is not None and aside.exists():
            if previous.exists():
                drop_outdated(path)
                previous.rename(_outdated(path))
            aside.rename(previous)
        shutil.rmtree(aside, ignore_errors=True)


def drop_staged(path: Path) -> None:
    """Remove what `stage_folder` wrote for the folder `path`, if it was not placed."""
    shutil.rmtree(staged(path), ignore_errors=True)


def drop_outdated(path: Path) -> None:
    """Remove the folder that was `previous` before the last `place_folder`: unlinking tens of MB takes a while."""
    shutil.rmtree(_outdated(path), ignore_errors=True)


@contextmanager
def _dropped_on_fault(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def share_file(source: Path, path: Path) -> None:
    """Make the file `path` the same as the flushed file `source`, atomically and flushed to disk.

    Both are one file on the disk, so no byte is written twice. A file system without links gets a
    copy.
    """
    _replace_file(path, lambda temporary: link_or_copy(source, temporary))


def replace_file(path: Path, content: bytes) -> None:
    """Make `path` a file of this content, atomically and flushed to disk. Other names of the old file keep it."""

    _replace_file(path, lambda temporary: _write_flushed(temporary, content))


def _replace_file(path: Path, make: Callable[[Path], None]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            temporary.unlink(missing_ok=True)
            make(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def link_or_copy(source: Path, path: Path) -> None:
    """Make the new file `path` a link to the flushed file `source`, or else a flushed copy."""
    try:
        path.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, path)
        sync(path)


def follow_umask(folder: Path) -> None:
    """Give everything in a new folder the rights that the umask gives to the folder itself.

    Libraries write through temporary files of their own, which only their owner may read. Copies
    keep the rights of their source. A file system without rights is left as it is.
    """
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o777
    for path in folder.rglob("*"):
        wanted = mode if path.is_dir() else mode & 0o666
        if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) & 0o777 != wanted:
            with suppress(OSError):
                path.chmod(wanted)


def settle(path: Path) -> None:
    """Clean up after a crash, and bring back the old folder if no new one took its place."""
    aside = _aside(path)
    if aside.exists() and not path.exists():
        aside.rename(path)
    shutil.rmtree(aside, ignore_errors=True)


def staged(path: Path) -> Path:
    """Return the folder that `stage_folder` fills."""
    return path.with_name(f".{path.name}.new")


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _outdated(path: Path) -> Path:
    return path.with_name(f".{path.name}.outdated")


def every_form(path: Path) -> tuple[Path, ...]:
    """Return the folder `path`, and the folders that stand in for it while it is replaced."""
    return path, staged(path), _aside(path), _outdated(path)


def home_folder() -> Path | None:
    """Return the user's home folder; None for a user without one, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def require_home() -> Path:
    """Return the user's home folder. Raises InputError if there is none: many libraries need one."""
    home = home_folder()
    if home is None:
        raise InputError("HOME", None, NO_HOME)
    return home


def sync(path: Path) -> None:
    """Flush the file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
