"""Load a worker's libraries: Ray imports this module in each process of a sweep's own Ray."""

from __future__ import annotations

from sweep.cluster.worker_libraries import load_libraries

load_libraries()
