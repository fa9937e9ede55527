"""Ray itself: start it quietly, for this sweep only, and end it."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import ray
from ray.exceptions import AuthenticationError

from engine.errors import InputError, first_line
from sweep.cluster.card_kinds import card_kinds
from sweep.cluster.slots import Hardware, Slots

LOOPBACK = "127.0.0.1"
NEEDS_TOKEN = "needs the cluster's RAY_AUTH_TOKEN, or RAY_AUTH_MODE=disabled if it has none"
REACH_S = 10.0


@contextmanager
def cluster(slots: Slots, address: str | None, log: Path) -> Iterator[None]:
    """A running Ray: our own on the loopback interface, or the one at `address`. Its messages go to the log file.

    `sweep.ray_environment` must have been set before this module was imported.
    """
    if slots.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a trial with train.device = auto must not find a GPU it was not given
    on_terminate = signal.getsignal(signal.SIGTERM)
    # Ray's threads print the death of a worker to stdout, whatever log_to_driver says; the screen has its own handle on it
    with _logging_to(log), open(log, "a") as prints, redirect_stdout(prints), redirect_stderr(prints):
        try:
            _connect(slots, address)
            signal.signal(signal.SIGTERM, on_terminate)  # Ray put in one of its own, which ends the process on the spot
            yield
        finally:
            _shut_down()  # prints what it has held back


def _shut_down() -> None:
    """End the connection with no garbage left: Python may collect Tune's handles in another thread at any time, and Ray ends the
    process where that happens while it shuts down."""
    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()


def inspect_cluster(address: str, num_gpus: int = 0, wait_s: float = 0.0, say: Callable[[str], None] = print) -> Hardware:
    """GPUs, CPU cores and kinds of cards of an existing Ray cluster, as soon as it has so many GPUs, or after wait_s."""
    _join(address)
    try:
        deadline, said = time.monotonic() + wait_s, None
        while (found := _gpus()) < num_gpus and time.monotonic() < deadline:
            if found != said:
                say(f"waiting for the cluster: {found} of {num_gpus} GPUs are there")
                said = found
            time.sleep(1.0)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        return Hardware(_gpus(), int(ray.cluster_resources().get("CPU", 0)), card_kinds(nodes))
    finally:
        ray.shutdown()


def _gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def _connect(slots: Slots, address: str | None) -> None:
    if address is not None:
        _join(address)
        return
    root = str(Path(__file__).resolve().parents[2])  # the workers import this package, wherever the driver was started
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    ray.init(
        address="local",  # whatever RAY_ADDRESS or a file in /tmp says, and whatever else runs here
        num_cpus=slots.num_slots * slots.cpus_per_trial,
        num_gpus=slots.num_slots if slots.device == "cuda" else 0,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _node_ip_address=LOOPBACK,
    )
    _refuse_open_ports()


def _refuse_open_ports() -> None:
    """Ray binds its ports by this address; another means that ray was imported before its environment was set."""
    addresses = {node["NodeManagerAddress"] for node in ray.nodes()}
    if addresses != {LOOPBACK}:
        raise RuntimeError(
            f"Ray listens on {', '.join(sorted(addresses))}, not on {LOOPBACK} alone: call set_ray_environment first"
        )


def _join(address: str) -> None:
    _refuse_unreachable(address)
    said = ""
    try:
        with _native_stderr() as printed:
            try:
                ray.init(address=address, log_to_driver=False, configure_logging=False)
            finally:
                said = printed()
    except AuthenticationError as error:
        raise InputError("cluster.address", address, f"{NEEDS_TOKEN} ({first_line(error)})") from None
    except (ConnectionError, ValueError, RuntimeError) as error:
        allowed = NEEDS_TOKEN if "InvalidAuthToken" in said else f"must be a running Ray cluster ({first_line(error)})"
        raise InputError("cluster.address", address, allowed) from None


def _refuse_unreachable(address: str) -> None:
    """Ray itself tries for minutes to reach a port where nothing listens. `auto` and the like are Ray's to resolve."""
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except (OSError, OverflowError) as error:
        raise InputError("cluster.address", address, f"must be a running Ray cluster ({first_line(error)})") from None


@contextmanager
def _native_stderr() -> Iterator[Callable[[], str]]:
    """Keep off the terminal what Ray's C++ prints while it connects, a line a second. Yields what was printed so far."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        try:
            os.dup2(file.fileno(), 2)
            yield lambda: os.pread(file.fileno(), 1 << 20, 0).decode(errors="replace")
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)


@contextmanager
def _logging_to(log: Path) -> Iterator[None]:
    """Send everything that is logged in this process to the file, and nothing to the terminal."""
    handler = logging.FileHandler(log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "ray"]:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        handler.close()
