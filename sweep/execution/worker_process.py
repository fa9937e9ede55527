"""Settle a worker's process before it loads its first model."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

from engine.errors import EngineError
from sweep.cluster.worker_libraries import raise_fault
from sweep.execution.new_card import measure_workers_card

VISIBLE, RAY_LEAVES_IT = "CUDA_VISIBLE_DEVICES", "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"


def settle_process(spec: Mapping[str, Any]) -> None:
    """Set the number of threads and torch's allocator, check the card, and have it measured if nobody has.

    spec: the worker's config. Raises the error of a library that could not be loaded beforehand, and
    EngineError if the process sees other cards than its own.
    """
    raise_fault()
    import torch  # the driver imports this module and must not load torch

    torch.set_num_threads(spec["num_threads"])
    if spec["device"] == "cuda" and torch.cuda.is_available():
        # before anything starts CUDA: predicted memory rests on it
        importlib.import_module(spec["engine"]["model"]).let_segments_grow()
        refuse_other_cards(torch._C._cuda_getDeviceCount())
    measure_workers_card(spec)


def refuse_other_cards(num_seen: int, environment: Mapping[str, str] = os.environ) -> None:
    """Raise EngineError if CUDA sees more cards than the one that Ray named for this process.

    num_seen: as CUDA itself counts. It reads the variable once: a library that asked before Ray set
    it would have all trials of a machine share its first card. Ray sets none where the user says so.
    """
    if num_seen > 1 and VISIBLE in environment and environment.get(RAY_LEAVES_IT, "0") in ("", "0"):
        raise EngineError(
            f"the process sees {num_seen} cards, not the one of its slot ({VISIBLE}={environment[VISIBLE]}): "
            "something initialised CUDA before its first trial"
        )
