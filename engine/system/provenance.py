"""Which code and which package versions something was measured with, as tags. No torch."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "accelerate", "ray", "optuna", "mlflow", "datasets", "peft")


def provenance() -> dict[str, str]:
    """`git.commit` (with `+changes` where files differ from it; absent outside a checkout), `version.<package>`, `python`."""
    tags = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            tags[f"version.{package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # peft is not needed to run, triton is not there without CUDA
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags["git.commit"] = commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    return tags


def _git(*arguments: str) -> str:
    """Output of a git command in the checkout this code lies in; empty where that is none."""
    here = Path(__file__).resolve().parent.parent.parent
    try:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
