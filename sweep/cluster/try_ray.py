"""Start Ray and stop it again, as a sweep does: `python -m sweep.cluster.try_ray`.

It prints nothing if that works. It is a process of its own, so that a Ray that hangs or dies takes
no one with it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from engine.system.command_line import run
from sweep.cluster.ray_environment import set_ray_environment
from sweep.cluster.ray_folder import settle_ray_folder
from sweep.cluster.slots import Slots


def main() -> int:
    """Return the exit code: 0 if Ray started."""
    return run(_main)


def _main() -> int:
    settle_ray_folder(os.environ)
    set_ray_environment(None)
    from sweep.cluster.connect import cluster  # loads ray, which reads that environment

    with tempfile.TemporaryDirectory(prefix="sweep-doctor-") as folder, cluster(Slots(1, "cpu", 1), None, Path(folder, "log")):
        return 0


if __name__ == "__main__":
    sys.exit(main())
