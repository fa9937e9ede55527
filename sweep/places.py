"""Try everything outside the project that a sweep needs later, before it prepares model and data."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from engine.system.files import require_home
from sweep.cluster.ray_folder import settle_ray_folder
from sweep.config.sweep import SweepConfig
from sweep.folder.output_folder import check_output_folder
from sweep.tracking.store_check import check_store


def check_places(config: SweepConfig, sweep_folder: Path | None) -> None:
    """Raise InputError if a folder or the MLflow store cannot work; print what may work later.

    sweep_folder: None for a new sweep.
    """
    require_home()
    output = Path(config.sweep.output_dir) if sweep_folder is None else sweep_folder.absolute().parent
    if sweep_folder is None:
        check_output_folder(output)
    if config.cluster.address is None:
        line = settle_ray_folder(os.environ)
        if line is not None:
            print(f"note       {line}", flush=True)
    for warning in check_store(config, output):
        print(f"WARNING: {warning}", file=sys.stderr, flush=True)
