"""Start Python processes that run this program's modules, not what the user's folder may hold.

`python -m engine` puts the working folder first on the module path. A folder of that name there, of
the user or of whoever made the files, would take our place.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])


def python_module(module: str, *arguments: str) -> list[str]:
    """Return a command like `python -m module`, without the working folder on the module path.

    It needs the environment of `own_environment`.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def own_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment with this program on the module path, and no empty entry there.

    An empty entry means the working folder. OpenMP's threads sleep while they wait, unless the user
    chose otherwise: on busy cores, threads that spin took four times the time and the processor time.
    """
    others = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != ROOT]
    return {"OMP_WAIT_POLICY": "PASSIVE", **environment, "PYTHONPATH": os.pathsep.join([*module_path(), *others])}


def module_path() -> list[str]:
    """Return what a Python process needs on its module path: nothing if this program is installed."""
    return [] if ROOT in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")) else [ROOT]
