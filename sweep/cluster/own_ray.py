"""Start and stop a Ray that serves one sweep, on the loopback interface.

This module loads ray, so call `set_ray_environment` before its first import.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import ray
from ray._private import worker as ray_worker
from ray._private.node import Node
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.job_config import JobConfig

from engine.system.child_python import module_path, own_environment
from sweep.cluster.early_ray import OwnRay
from sweep.cluster.slots import Slots
from sweep.cluster.worker_libraries import environment_of

LOOPBACK = "127.0.0.1"
NOT_FOR_RAY = (signal.SIGTERM, signal.SIGHUP)
WORKERS_END_S = 0.3  # a raylet gives 0.2 s
KILLED_S = 5.0
PRELOAD = "sweep.cluster.preload"


class OwnModules(JobConfig):
    """Keep the driver's working folder off the workers' module path.

    Ray would put it first, and a folder named `engine` there would take our place.
    """

    def _runtime_env_has_working_dir(self) -> bool:
        return True


def start_ray(wanted: OwnRay) -> None:
    """Start Ray with a CPU, in Ray's terms, for each slot.

    With modules to load, Ray also starts a process for each CPU, which loads them and then takes the
    slot's first trial. Raises RuntimeError if Ray would listen on more than the loopback interface.
    """
    slots = wanted.slots
    hide_gpus(slots)
    # the workers must be able to import this package, wherever the driver was started
    os.environ.update(own_environment())
    config = {}
    if wanted.modules:
        os.environ.update(environment_of(slots.cpus_per_trial, wanted.modules))
        config = {
            "prestart_worker_first_driver": True,
            "preload_python_modules": [PRELOAD],
            # else Ray ends these processes as soon as Tune reserves their CPUs, before it uses them
            "num_workers_soft_limit": slots.num_slots,
        }
    with stop_signals_blocked():
        ray.init(
            address="local",  # ignores RAY_ADDRESS, files in /tmp and any other Ray on this machine
            num_cpus=slots.num_slots,
            num_gpus=slots.num_slots if slots.device == "cuda" else 0,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            job_config=OwnModules(_py_driver_sys_path=module_path()),
            _node_ip_address=LOOPBACK,
            _system_config=config,
        )
    _refuse_open_ports()


def hide_gpus(slots: Slots) -> None:
    """Hide the GPUs if the trials get none: one with train.device = auto must not find any."""
    if slots.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def shut_down() -> None:
    """Disconnect from Ray with no garbage left, and garbage collection off.

    Python may collect Tune's handles in another thread at any time. If that happens while Ray shuts
    down, Ray ends the process.

    Returns once the workers of our own Ray have ended: their memory on the cards is free then.
    """
    node = ray_worker._global_node
    is_own = node is not None and node.is_head()
    below = _processes_below(node) if is_own else []
    if is_own:
        # Ray would send each of its five processes SIGTERM, which they do not take, and wait a second
        kill = node.kill_all_processes
        node.kill_all_processes = lambda **options: kill(**{**options, "allow_graceful": False})
    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()
    _end(below)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Block SIGTERM and SIGHUP in processes that this thread starts inside.

    A machine's manager or a closing terminal sends them to all processes. A raylet that takes one
    kills its workers within 20 ms, before they can save. So the driver alone takes them and then
    ends Ray; each worker unblocks SIGTERM for itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_RAY)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _processes_below(node: Node) -> list[psutil.Process]:
    """Return the processes that the node's raylet has started."""
    with suppress(psutil.Error, LookupError):
        (raylet,) = node.all_processes[PROCESS_TYPE_RAYLET]
        return psutil.Process(raylet.process.pid).children(recursive=True)
    return []


def _end(processes: list[psutil.Process]) -> None:
    """Let workers end by themselves for WORKERS_END_S. Ray's agents, which have nothing to end, take seconds more."""
    agents = [process for process in processes if _title(process).endswith("Agent")]
    slow = psutil.wait_procs([process for process in processes if process not in agents], timeout=WORKERS_END_S)[1]
    for process in [*agents, *slow]:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(slow, timeout=KILLED_S)


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return process.cmdline()[0] if process.cmdline() else ""
    return ""


def _refuse_open_ports() -> None:
    """Raise RuntimeError if Ray listens on more than the loopback interface.

    Ray binds its ports by the node's address. Another address means that ray was imported before
    its environment was set.
    """
    addresses = {node["NodeManagerAddress"] for node in ray.nodes()}
    if addresses != {LOOPBACK}:
        raise RuntimeError(
            f"Ray listens on {', '.join(sorted(addresses))}, not on {LOOPBACK} alone: call set_ray_environment first"
        )
