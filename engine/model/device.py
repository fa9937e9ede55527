"""Pick the device of a trial, and measure or limit this process's memory on it and on the host."""

from __future__ import annotations

import gc
import math
import os
import re
import resource
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.command_answers import TorchFacts
from engine.errors import InputError, first_line
from engine.units import GIB

# Share of the host memory available when a trial starts. The rest is for data, page cache and the
# driver.
HOST_SHARE = 0.7
# Environment variables for torch's allocator, the old name and the new one.
ALLOCATOR_SETTINGS, GROWING = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"), "expandable_segments:True"
WORKSPACE_SIDE = 64  # of a matrix whose product makes torch take a workspace


def limit_memory(gib: float, device: torch.device) -> None:
    """Limit this process to `gib` GiB of a CUDA device, at most to all of its memory."""
    # torch can only limit a device that has an index
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total), index)


def peak_gib(device: torch.device) -> float:
    """Return the peak in GiB: bytes allocated by torch on CUDA, the resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def peak_reserved_gib(device: torch.device) -> float:
    """Return the peak in GiB of what torch holds of a CUDA device, with blocks that no tensor uses."""
    return torch.cuda.max_memory_reserved() / GIB if device.type == "cuda" else peak_gib(device)


def host_share_gib(held_gib: float = 0.0, meminfo: Path = Path("/proc/meminfo"), devices: Path = Path("/dev")) -> float:
    """Return the host memory in GiB that one process may pin: an equal share for each GPU.

    `held_gib` is what this process has pinned already. Without /proc the amount is not known, and
    the answer is infinity.
    """
    try:
        available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf
    num_gpus = len([d for d in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", d.name)])
    return HOST_SHARE * (held_gib + int(available.split()[1]) / 2**20) / max(1, num_gpus)


def find_cards() -> TorchFacts:
    """Return what torch sees of this machine's GPUs. Never raises: an error becomes its line."""
    cards, fault = [], None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")  # torch says in a warning why CUDA cannot be used
        try:
            for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
                (free, total), known = torch.cuda.mem_get_info(i), torch.cuda.get_device_properties(i)
                capability = f"{known.major}.{known.minor}"
                gib = {"memory_gib": total / GIB, "free_gib": free / GIB}
                cards.append({"name": known.name, **gib, "capability": capability, "bfloat16": known.major >= 8})
        except Exception as error:
            fault = first_line(error)
    fault = fault or next((first_line(warning.message) for warning in said if not cards), None)
    return TorchFacts(torch.__version__, torch.version.cuda, fault, cards)


def pick_device(wanted: str) -> torch.device:
    """Return the device; `auto` is CUDA if present. Raises InputError for `cuda` without a GPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device", wanted, "no CUDA device is visible; allowed here: auto, cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    let_segments_grow()
    return torch.device("cuda")


def let_segments_grow() -> None:
    """Let torch's allocator grow and shrink its segments, unless the user chose its settings.

    Blocks of one row size then serve rows of any other. Without it, Qwen3-4B on packed rows reserved
    3 % more (H100), at the same speed. Too late once CUDA has started.
    """
    if torch.cuda.is_initialized() or any(name in os.environ for name in ALLOCATOR_SETTINGS):
        return
    os.environ[ALLOCATOR_SETTINGS[0]] = GROWING  # for torch, which reads it when CUDA starts, and for child processes
    set_now = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if set_now is not None:  # should torch have read it already
        set_now(GROWING)


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Return the named dtype; `auto` is bfloat16 on CUDA and float32 on the CPU."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[wanted]


def free(device: torch.device) -> None:
    """Return the memory of dropped tensors to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one CPU thread: a pass of a few tokens is too small to share between threads.

    On two busy cores, four answers took 65 s with two threads and 1.2 s with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def capture(compute: Callable[[], Tensor], pool: Any) -> tuple[Tensor, Callable[[], None]]:
    """Record `compute` as a CUDA graph, without computing. Return its result's tensor and what replays it.

    Raises OutOfMemoryError, and RuntimeError if the code waits for the device. After the second, the
    pool takes no more recordings: see `Recordings.start_over`.
    """
    graph, result, fault, stream = torch.cuda.CUDAGraph(), None, None, torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            try:
                result = compute()
            except Exception as error:  # the end of a broken recording raises an error of its own
                fault = error
    except RuntimeError as error:
        fault = fault or error
    try:
        if fault is not None:
            _leave_recording(stream, pool)
            raise fault
        return result, graph.replay
    finally:
        fault = None  # its traceback holds this frame, and the frame would hold it


def record_workspaces(pool: Any, device: torch.device) -> Callable[[], None]:
    """Record matrix products, forward and backward, into an empty pool. Return what keeps their recording.

    torch gives cuBLAS a workspace at a thread's first product on a stream, for good: one for the caller
    and one for autograd's thread. Taken by a row's recording, the second would lie above all that the
    row keeps. It would cut the pool in two, and later rows would need as much more as their largest
    tensor, 0.25 GiB for chunks of logits. So the workspaces come first.
    """

    def products() -> Tensor:
        x = torch.zeros(WORKSPACE_SIDE, WORKSPACE_SIDE, device=device, requires_grad=True)
        return torch.autograd.grad((torch.addmm(x[0], x, x) @ x).sum(), x)[0]

    products()  # cuBLAS loads these kernels outside the recording
    torch.cuda.synchronize(device)
    return capture(products, pool)[1]


def _leave_recording(stream: torch.cuda.Stream, pool: Any) -> None:
    """Undo what torch leaves behind if the end of a recording raises an error. stream: the one before it.

    Torch stays on the recording's stream. Its allocator counts the pool as recording, and therefore
    frees no cached memory when memory runs out. Its random generator stays in the recording's mode,
    which a recording that succeeds ends. Its allocator of pinned memory counts the pool as recording
    too, and offers no way to end that, so the pool is lost.
    """
    torch.cuda.set_stream(stream)
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        return  # the recording ended as usual, and only its content was at fault
    torch._C._cuda_releasePool(device, pool)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.zeros((), device=device)
