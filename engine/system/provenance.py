"""Collect commit and package versions as tags: they tell what a result was measured with.

No torch.
"""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "accelerate", "ray", "optuna", "mlflow", "datasets", "peft")


def provenance() -> dict[str, str]:
    """Return the tags `python`, `platform`, `version.<package>` and, in a checkout, `git.commit`.

    The commit ends in `+changes` if files differ from it.
    """
    tags = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            tags[f"version.{package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # peft is optional, and triton is missing without CUDA
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags["git.commit"] = commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    return tags


def _git(*arguments: str) -> str:
    """Return the output of a git command in this code's checkout; empty outside a checkout."""
    here = Path(__file__).resolve().parent.parent.parent
    try:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
