"""The worker: a Tune Trainable that trains one trial after the other in one process, with the base model resident.

A class, not a function, because only classes can be reused: a no-op trial held its slot 8.45 s without reuse, 0.087 s with.
Nothing a trial does may take the worker down: every exception becomes an outcome, and the next trial goes on.
"""

from __future__ import annotations

import errno
import gc
import importlib
import json
import math
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray.tune import Trainable

from engine.config import TrainConfig, parse
from engine.errors import DivergedError, EngineError, InputError, OutOfMemory, StorageError
from engine.files import storage_fault
from engine.metrics import Report
from sweep.outcome import Outcome
from sweep.runs import FileLock

LOCK_PATIENCE_S = 60.0
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # beyond what engine.files writes: caches of libraries


class TrialWorker(Trainable):
    """step() trains to the next rung. Results: outcome, report (JSON text, or empty), error (one line, or none), memory
    (predicted_gib and measured_gib as JSON text, where it ran out), done. Ended as RUNNING: the disk took no more, which is no
    trial's fault; it goes on from its last checkpoint when the sweep is resumed."""

    def setup(self, config: dict[str, Any]) -> None:
        os.environ["OMP_NUM_THREADS"] = str(config["num_threads"])
        self._base: Any = None
        self._base_key: tuple[Any, str] | None = None
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._close()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        try:
            return self._advance()
        except DivergedError as error:
            return self._failed(Outcome.DIVERGED, error)
        except Exception as error:  # the boundary: whatever a trial raises, the sweep goes on and says so
            return self._failed(Outcome.OUT_OF_MEMORY if _is_out_of_memory(error) else Outcome.FAILED, error)

    def cleanup(self) -> None:
        self._close()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {}  # the engine writes its own checkpoints; Tune's are not used

    def load_checkpoint(self, checkpoint: Any) -> None:
        raise NotImplementedError("a trial continues from its own folder, not from Tune's checkpoint")

    def _begin(self, config: dict[str, Any]) -> None:
        self._spec, self._reports, self._lock = config, None, None

    def _advance(self) -> dict[str, Any]:
        if self._reports is None:
            self._reports = self._start()
        report = next(self._reports, None)
        if report is None:
            raise RuntimeError("training ended before its last rung")
        if not math.isfinite(report.eval_loss):
            raise DivergedError(f"eval_loss = {report.eval_loss} at rung {report.rung}")
        done = report.rung >= self._num_rungs
        if done:
            self._close()
        return _result(Outcome.COMPLETE if done else Outcome.RUNNING, report=report, done=done)

    def _start(self) -> Iterator[Report]:
        config = parse(TrainConfig, json.loads(self._spec["train_config"]))
        self._num_rungs = len(config.train.report_grid())
        run_dir = Path(self._spec["run_dir"])
        run_dir.mkdir(parents=True, exist_ok=True)
        self._lock = _wait_for(run_dir)
        return importlib.import_module(self._spec["engine"]["train"]).train(config, run_dir, base=self._resident_base(config))

    def _resident_base(self, config: TrainConfig) -> Any:
        """The base model, loaded again only when the model section or the device changed."""
        key = (config.model, self._spec["device"])
        if self._base_key != key:
            self._base, self._base_key = None, None
            self._base = _load_base(config, self._spec)
            self._base_key = key
        return self._base

    def _failed(self, outcome: Outcome, error: Exception) -> dict[str, Any]:
        if isinstance(error, StorageError) or storage_fault(error) in DISK_FAULTS:
            outcome = Outcome.RUNNING
        line = " ".join(str(error).split()) or type(error).__name__
        text = line if isinstance(error, EngineError) else f"{type(error).__name__}: {line}"
        run_dir = Path(self._spec["run_dir"])
        with suppress(OSError):  # the disk may be what failed
            (run_dir / "error.txt").write_text("".join(traceback.format_exception(error)))
        self._close()
        memory = _memory(error)
        never_started = isinstance(error, InputError) or (isinstance(error, OutOfMemory) and "measured_gib" not in memory)
        if outcome is not Outcome.DIVERGED and not never_started:
            self._base, self._base_key = None, None  # its state, or the allocator's, is in doubt: load it again
        return _result(outcome, error=text[:500], memory=memory, done=True)

    def _close(self) -> None:
        reports, lock = self._reports, self._lock
        self._reports = self._lock = None
        try:
            if reports is not None:
                reports.close()
        finally:
            if lock is not None:
                lock.release()


def _result(
    outcome: Outcome,
    *,
    report: Report | None = None,
    error: str | None = None,
    memory: dict[str, float] | None = None,
    done: bool,
) -> dict[str, Any]:
    # report and memory travel as text: Tune flattens nested results
    text = json.dumps(report.to_dict()) if report else ""
    return {"outcome": str(outcome), "report": text, "error": error, "memory": json.dumps(memory or {}), "done": done}


def _memory(error: Exception) -> dict[str, float]:
    """The peaks that the engine knows where memory ran out."""
    peaks = {name: getattr(error, name) for name in ("predicted_gib", "measured_gib")} if isinstance(error, OutOfMemory) else {}
    return {name: peak for name, peak in peaks.items() if peak is not None}


def _is_out_of_memory(error: Exception) -> bool:
    import torch  # here, because the driver imports this module and must not load torch

    # the CPU allocator has no exception of its own
    return isinstance(error, OutOfMemory | torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _load_base(config: TrainConfig, spec: dict[str, Any]) -> Any:
    import torch

    torch.set_num_threads(spec["num_threads"])
    gc.collect()  # what a failed trial left behind is freed only now: its traceback held the tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return importlib.import_module(spec["engine"]["model"]).load_base(config.model, torch.device(spec["device"]))


def _wait_for(run_dir: Path) -> FileLock:
    """Hold the trial's folder: a worker of a killed driver may live on for seconds, and two must not write one checkpoint."""
    deadline = time.monotonic() + LOCK_PATIENCE_S
    lock = FileLock(run_dir / ".lock")
    while not lock.acquire():
        if time.monotonic() > deadline:
            raise RuntimeError(f"another process has held {run_dir} for {LOCK_PATIENCE_S:.0f} s")
        time.sleep(0.2)
    return lock
