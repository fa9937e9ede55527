"""Load what a worker's first trial would load, in its process, while the driver still prepares.

No library may initialise CUDA here. Ray names the process's card with its first trial, and CUDA
reads that name once: a process that asked earlier would see every card, and use the first.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

VARIABLE = "QLORA_SWEEP_WORKER"
THREADS = "OMP_NUM_THREADS"
# torch.cuda.is_available() then asks the driver's management library and leaves CUDA alone
CUDA_UNASKED = "PYTORCH_NVML_BASED_CUDA_CHECK"
_faults: list[BaseException] = []


def environment_of(num_threads: int, modules: tuple[str, ...]) -> dict[str, str]:
    """Return the environment by which `load_libraries` knows what to load, and with how many threads."""
    return {VARIABLE: json.dumps([num_threads, modules])}


def load_libraries(environment: MutableMapping[str, str] = os.environ) -> None:
    """Import the modules that `environment_of` named, in their order.

    The number of threads is set before, because OpenMP reads it once. The first module that cannot
    be imported ends this, and `raise_fault` raises its error in the first trial.
    """
    if VARIABLE not in environment:
        return
    num_threads, modules = json.loads(environment[VARIABLE])
    environment[THREADS] = str(num_threads)
    with _set(environment, CUDA_UNASKED, "1"):
        try:
            for module in modules:
                importlib.import_module(module)
        except Exception as error:
            _faults.append(error)


def raise_fault() -> None:
    """Raise the error of a module that could not be imported.

    A second import may raise another error than the first: parts of the library are loaded by then.
    """
    if _faults:
        raise _faults[0]


@contextmanager
def _set(environment: MutableMapping[str, str], name: str, value: str) -> Iterator[None]:
    before: Mapping[str, str] = {name: environment[name]} if name in environment else {}
    environment[name] = value
    try:
        yield
    finally:
        del environment[name]
        environment.update(before)
