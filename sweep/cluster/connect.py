"""Start Ray quietly for one sweep, or join an existing cluster, and disconnect at the end."""

from __future__ import annotations

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
from engine.system.child_python import module_path
from sweep.cluster.card_kinds import card_kinds
from sweep.cluster.early_ray import OwnRay, leave_early_ray, take_early_ray
from sweep.cluster.own_ray import OwnModules, hide_gpus, shut_down, start_ray
from sweep.cluster.slots import Hardware, Slots

NEEDS_TOKEN = "needs the cluster's RAY_AUTH_TOKEN, or RAY_AUTH_MODE=disabled if it has none"
REACH_S = 10.0


@contextmanager
def cluster(slots: Slots, address: str | None, log: Path, modules: tuple[str, ...] = ()) -> Iterator[None]:
    """Run Ray inside the block: our own on the loopback interface, or the one at `address`.

    modules: what a worker of our own Ray loads before it has a trial. Such a Ray may run already
    (sweep/cluster/early_ray.py). Ray's messages go to the log file. Call `set_ray_environment`
    (sweep/cluster/ray_environment.py) before the first import of this module. Raises InputError if
    the address cannot be joined.
    """
    hide_gpus(slots)
    on_terminate = signal.getsignal(signal.SIGTERM)
    # log_to_driver does not stop Ray's threads from printing a worker's death to stdout;
    # the screen holds its own handle on stdout, so it stays visible
    with _logging_to(log), open(log, "a") as prints, redirect_stdout(prints), redirect_stderr(prints):
        wanted = OwnRay(slots, modules)
        is_there = address is None and take_early_ray(wanted)
        try:
            if address is not None:
                _join(address)
            elif not is_there:
                start_ray(wanted)
            # replaces Ray's own handler, which ends the process at once
            signal.signal(signal.SIGTERM, on_terminate)
            yield
        finally:
            try:
                shut_down()  # Ray prints here what it has held back
            finally:
                leave_early_ray()


def inspect_cluster(address: str, num_gpus: int = 0, wait_s: float = 0.0, say: Callable[[str], None] = print) -> Hardware:
    """Return the GPUs, CPU cores and card kinds of an existing Ray cluster.

    Returns once the cluster has num_gpus GPUs, or after wait_s seconds. Raises InputError if the
    address cannot be joined.
    """
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


def _join(address: str) -> None:
    _refuse_unreachable(address)
    said = ""
    try:
        with _native_stderr() as printed:
            try:
                job = OwnModules(_py_driver_sys_path=module_path())
                ray.init(address=address, log_to_driver=False, configure_logging=False, job_config=job)
            finally:
                said = printed()
    except AuthenticationError as error:
        raise InputError("cluster.address", address, f"{NEEDS_TOKEN} ({first_line(error)})") from None
    except (ConnectionError, ValueError, RuntimeError) as error:
        allowed = NEEDS_TOKEN if "InvalidAuthToken" in said else f"must be a running Ray cluster ({first_line(error)})"
        raise InputError("cluster.address", address, allowed) from None


def _refuse_unreachable(address: str) -> None:
    """Raise InputError if nothing listens at the address, where Ray itself would try for minutes.

    Names such as `auto` pass, because Ray resolves them.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except (OSError, OverflowError) as error:
        raise InputError("cluster.address", address, f"must be a running Ray cluster ({first_line(error)})") from None


@contextmanager
def _native_stderr() -> Iterator[Callable[[], str]]:
    """Keep off the terminal what Ray's C++ prints while it connects, a line a second.

    Yields a function that returns the text printed so far.
    """
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
    """Send all log messages of this process to the file, and none to the terminal."""
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
