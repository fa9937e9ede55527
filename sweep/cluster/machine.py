"""Check what a sweep needs of the machine: packages, memory, disk, temporary folder.

Each check returns findings with what to do. Nothing is kept on the disk.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from engine.errors import InputError, first_line
from engine.system.file_lock import FileLock
from engine.system.files import write_text
from engine.units import GIB
from sweep.cluster.findings import Finding
from sweep.cluster.ray_folder import settle_ray_folder

PACKAGE = "qlora-sweep"
# what an 8B model takes: 15 GiB downloaded, 5 GiB packed
MODEL_GIB, LEAST_DISK_GIB = 20.0, 0.5
LEAST_MEMORY_GIB, LEAST_SHM_GIB = 6.0, 0.5


def check_python() -> Iterator[Finding]:
    """Name the Python that runs, and compare it and its packages with pyproject.toml."""
    needed, packages = _requirements()
    found = f"{platform.python_version()} ({sys.executable})"
    if needed and not Requirement(f"python{needed}").specifier.contains(platform.python_version()):
        yield Finding("fault", "Python", found, f"needs {needed}: install it, then `make quickstart PYTHON=python3.11`")
    else:
        yield Finding("ok", "Python", found)
    wrong = [line for line in map(_unmet, packages) if line]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("transformers", "ray", "optuna") if _has(name))
    if wrong:
        yield Finding("fault", "packages", "; ".join(wrong), f"{sys.executable} -m pip install -c constraints.txt -e .")
    else:
        yield Finding("ok", "packages", f"{len(packages)} as pyproject.toml wants them ({versions})")


def _requirements() -> tuple[str, list[Requirement]]:
    """Return the version of Python and the packages needed: of the checkout, else as installed."""
    file = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text())["project"]
        return project["requires-python"], [Requirement(line) for line in project["dependencies"]]
    listed = [Requirement(line) for line in metadata.requires(PACKAGE) or []]
    needed = [requirement for requirement in listed if not requirement.marker or requirement.marker.evaluate({"extra": ""})]
    return metadata.metadata(PACKAGE)["Requires-Python"], needed


def _unmet(requirement: Requirement) -> str | None:
    if not _has(requirement.name):
        return f"{requirement.name} is missing"
    version = metadata.version(requirement.name)
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} is {version}, needs {requirement.specifier}"


def _has(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def check_compiler() -> Finding:
    """Look for the C compiler with which Triton builds what launches its kernels on a GPU."""
    found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        return Finding("warning", "C compiler", "none, and Triton's kernels need one on a GPU", "apt install gcc python3-dev")
    return Finding("ok", "C compiler", found)


def check_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> Finding:
    """Compare the memory that a process may still take with what loading a model needs."""
    available = next(int(line.split()[1]) / 2**20 for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    limit = _cgroup_limit_gib(cgroup)
    free, source = (available, "available") if limit is None or limit > available else (limit, "left in this container")
    if free < LEAST_MEMORY_GIB:
        todo = "use fewer slots (cluster.num_cpu_slots=1), or end other programs; an 8B model needs about 20 GiB to load"
        return Finding("warning", "memory", f"{free:.1f} GiB {source}", todo)
    return Finding("ok", "memory", f"{free:.1f} GiB {source}")


def _cgroup_limit_gib(cgroup: Path) -> float | None:
    """Return what the container may still take; None without a limit."""
    try:
        return (int((cgroup / "memory.max").read_text()) - int((cgroup / "memory.current").read_text())) / GIB
    except (OSError, ValueError):  # "max", or another version of cgroups
        return None


def check_shared_memory(place: Path = Path("/dev/shm")) -> Finding:
    """Look at the folder in which Ray shares memory between processes."""
    if not place.is_dir():
        return Finding("warning", str(place), "is not there", "Ray then uses the temporary folder, which is slower")
    free = shutil.disk_usage(place).free / GIB
    if free < LEAST_SHM_GIB:
        return Finding("warning", str(place), f"{free:.2f} GiB free", "in Docker: docker run --shm-size=2g")
    return Finding("ok", str(place), f"{free:.1f} GiB free")


def check_folder(subject: str, folder: Path, setting: str) -> Finding:
    """Write, lock and measure a folder that a sweep writes to, or the nearest one above it."""
    place = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    name = f"{folder}{'' if place == folder.absolute() else ' (will be made)'}"
    other = f"name another folder: {setting}"
    probe = place / f".sweep-doctor-{os.getpid()}"
    try:
        write_text(probe, "probe")
        lock = FileLock(probe)
        lock.acquire()
        lock.release()
    except Exception as error:
        return Finding("fault", subject, f"{name} cannot be used ({first_line(error)})", other)
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    free = shutil.disk_usage(place).free / GIB
    if free < LEAST_DISK_GIB:
        return Finding("fault", subject, f"{name}: {free:.2f} GiB free", f"make room, or {other}")
    if free < MODEL_GIB and subject != "output":
        todo = f"enough for small models; an 8B model takes about {MODEL_GIB:.0f} GiB: make room, or {other}"
        return Finding("warning", subject, f"{name}: {free:.1f} GiB free", todo)
    return Finding("ok", subject, f"{name}: {free:,.1f} GiB free")


def check_temporary_folder() -> Finding:
    """Say whether Ray can put its files into the temporary folder, or where a sweep puts them instead."""
    folder = tempfile.gettempdir()
    try:
        line = settle_ray_folder(dict(os.environ))
    except InputError as error:
        return Finding("fault", "TMPDIR", f"{error.field} = {error.value}", error.allowed)
    free = f"{shutil.disk_usage(folder).free / GIB:,.1f} GiB free"
    return Finding("ok", "TMPDIR", f"{folder}: {free}" if line is None else f"{line}; {folder}: {free}")
