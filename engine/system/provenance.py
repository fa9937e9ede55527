"""Collect commit, versions and host: they tell what a result was measured with. No torch."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "accelerate", "ray", "optuna", "mlflow", "datasets", "peft")
MISSING = "none"
DRIVER, PROCESSOR = Path("/proc/driver/nvidia/version"), Path("/proc/cpuinfo")


def provenance() -> dict[str, str]:
    """Return the tags `python`, `platform`, `version.<package>` and, in a checkout, `git.commit`.

    The commit ends in `+changes` if files differ from it.
    """
    tags = {"python": platform.python_version(), "platform": platform.platform()}
    tags |= package_tags(PACKAGES)
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags["git.commit"] = commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    return tags


def package_tags(names: Iterable[str]) -> dict[str, str]:
    """Return `version.<package>` of each package that is installed: peft is optional, and triton is missing without CUDA."""
    versions = {f"version.{name}": package_version(name) for name in names}
    return {tag: version for tag, version in versions.items() if version != MISSING}


def package_version(name: str) -> str:
    """Return the version of an installed package; `none` if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return MISSING


def nvidia_driver() -> str:
    """Return the version of NVIDIA's driver; `none` without one."""
    try:
        found = re.search(r"\b\d{3}(\.\d+)+\b", DRIVER.read_text())
    except OSError:
        found = None
    if found:
        return found[0]
    try:  # in WSL the driver has no file there
        import pynvml

        pynvml.nvmlInit()
        said = pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # without a driver, NVML raises errors of its own
        return MISSING
    return said.decode() if isinstance(said, bytes) else str(said)


def host_name() -> str:
    """Return the processor's name, which decides how fast launches are; the machine's kind if it has none."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", PROCESSOR.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def _git(*arguments: str) -> str:
    """Return the output of a git command in this code's checkout; empty outside a checkout."""
    here = Path(__file__).resolve().parent.parent.parent
    try:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
