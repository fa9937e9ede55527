"""Decide which hardware the trials get.

A slot is one GPU, or a share of the CPU cores if there is no GPU. The driver must count GPUs
without torch: a CUDA context in the driver would take memory that the trials need.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from engine.errors import InputError
from sweep.cluster.card_kinds import CardKind, Label, selector
from sweep.config.sweep import ClusterConfig


@dataclass(frozen=True)
class Hardware:
    """Count the hardware of this machine, or of an existing cluster.

    kinds: the kinds of a cluster's cards. It is empty for one machine, whose cards are not told
    apart.
    """

    num_gpus: int
    num_cpus: int
    kinds: tuple[CardKind, ...] = ()


@dataclass(frozen=True)
class Slots:
    """Say how many trials run at once, and what each gets."""

    num_slots: int
    device: str
    cpus_per_trial: int

    def resources_per_trial(self, in_own_ray: bool) -> dict[str, float]:
        """Return the resources of one trial in Ray's terms.

        in_own_ray: in a Ray that the sweep starts, one CPU is a slot, whatever its cores. So Ray
        starts one process for each slot, not for each core.
        """
        return {"cpu": 1 if in_own_ray else self.cpus_per_trial, "gpu": 1 if self.device == "cuda" else 0}

    def bundle(self, avoid: Iterable[Label] = ()) -> tuple[dict[str, float], dict[str, str]]:
        """Return the bundle of a placement group that holds one trial, and its label selector.

        The selector keeps the trial off nodes with the labels in `avoid`.
        """
        wanted = {"CPU": float(self.cpus_per_trial), "GPU": 1.0 if self.device == "cuda" else 0.0}
        return {name: amount for name, amount in wanted.items() if amount}, selector(avoid)

    def describe(self) -> str:
        each = "one GPU" if self.device == "cuda" else f"{self.cpus_per_trial} CPU core{'s' if self.cpus_per_trial > 1 else ''}"
        return f"{self.num_slots} slot{'s' if self.num_slots > 1 else ''} of {each}"


def plan_slots(cluster: ClusterConfig, device: str, num_gpus_found: int, num_cpus_found: int) -> Slots:
    """Return the slots that this hardware gives.

    device: train.device. Raises InputError if the config asks for more than there is.
    """
    wanted = num_gpus_found if cluster.num_gpus == "auto" else cluster.num_gpus
    if device == "cpu":
        wanted = 0
    if wanted > num_gpus_found:
        raise InputError("cluster.num_gpus", wanted, f"must be at most {num_gpus_found}, the number of GPUs found")
    if device == "cuda" and wanted == 0:
        raise InputError("train.device", device, f"needs a GPU that cluster.num_gpus allows; {num_gpus_found} were found")
    if wanted:
        return _limited(wanted, cluster, "cuda")
    if cluster.cpus_per_trial > num_cpus_found:
        allowed = f"must be at most {num_cpus_found}, the number of CPU cores found"
        raise InputError("cluster.cpus_per_trial", cluster.cpus_per_trial, allowed)
    slots = num_cpus_found // cluster.cpus_per_trial if cluster.num_cpu_slots == "auto" else cluster.num_cpu_slots
    return _limited(slots, cluster, "cpu")


def _limited(num_slots: int, cluster: ClusterConfig, device: str) -> Slots:
    if cluster.max_concurrent != "auto":
        num_slots = min(num_slots, cluster.max_concurrent)
    return Slots(num_slots, device, cluster.cpus_per_trial)


def local_hardware(cluster: ClusterConfig) -> Hardware:
    """Return the hardware of this machine, whatever the section says about a cluster."""
    return Hardware(count_gpus(), count_cpus())


def count_cpus() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_gpus() -> int:
    """Return the number of NVIDIA GPUs that this process may use.

    These are the GPUs that nvidia-smi lists, less those that CUDA_VISIBLE_DEVICES hides.
    """
    try:
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(listed)
    return min(len(listed), len([entry for entry in visible.split(",") if entry.strip() and entry.strip() != "-1"]))
