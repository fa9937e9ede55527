"""The worker: a Tune Trainable that trains one trial after the other in one process, with the base model resident.

A class, not a function, because only classes can be reused: a no-op trial held its slot 8.45 s without reuse, 0.087 s with.
Nothing a trial does may take the worker down: every exception becomes an outcome, and the next trial goes on.
"""

from __future__ import annotations

import errno
import faulthandler
import gc
import importlib
import json
import math
import os
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import ray
from ray.tune import Trainable

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.errors import DivergedError, EngineError, InputError, Interrupted, OutOfMemory, StorageError
from engine.system.file_lock import FileLock
from engine.system.files import storage_fault
from engine.trial_report import TrialReport, read_reports
from sweep.execution.interruption import Interruption
from sweep.folder.notes import note_terminated
from sweep.tracking.system_metrics import SystemSampler, machine_reader, write_system
from sweep.trials.record import Outcome

LOCK_PATIENCE_S = 60.0
TRACE_BEFORE_KILL_S = 1.0
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # beyond what engine.files writes: caches of libraries


class TrialWorker(Trainable):
    """step() trains to the next rung. Results: outcome, report (JSON text, or empty), error (one line, or none), memory
    (predicted_gib and measured_gib as JSON text, where it ran out), timing (JSON text, see timeline.Span), done. Ended as
    RUNNING with an error: the disk took no more, which is no trial's fault; it goes on from its last checkpoint when the sweep is
    resumed. Ended as RUNNING without one: the driver asked for it, and the trial is saved. On SIGTERM the process ends so."""

    def setup(self, config: dict[str, Any]) -> None:
        self._slot, self._last_end_s = _slot(config["device"]), None
        os.environ["OMP_NUM_THREADS"] = str(config["num_threads"])
        self._sampler = SystemSampler(machine_reader(config["device"]))
        self._base: Any = None
        self._base_key: tuple[Any, str] | None = None
        self._interruption = Interruption(self._note_terminated)
        self._begin(config)
        self._interruption.listen()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._close()
        self._last_end_s = self._newest_end_s
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        if self._began_s is None:
            self._began_s = time.time()
        timeout_s = self._spec["report_timeout_s"]
        if timeout_s is not None:  # the driver kills what hangs: first say in Ray's log of this process where
            faulthandler.dump_traceback_later(max(timeout_s - TRACE_BEFORE_KILL_S, 0.1))
        try:
            with self._interruption.working():
                result = self._advance_or_fail()
        finally:
            faulthandler.cancel_dump_traceback_later()
        if self._interruption.is_terminated:  # what there is to hear of it, its next process will say
            self._note_terminated()
            raise SystemExit("its process was asked to end (SIGTERM)")
        self._is_over = result["done"]
        self._newest_end_s = time.time()
        return {**result, "timing": json.dumps(self._timing())}

    def cleanup(self) -> None:
        self._close()
        self._sampler.stop()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {}  # the engine writes its own checkpoints; Tune's are not used

    def load_checkpoint(self, checkpoint: Any) -> None:
        raise NotImplementedError("a trial continues from its own folder, not from Tune's checkpoint")

    def _begin(self, config: dict[str, Any]) -> None:
        self._spec, self._reports, self._lock, self._is_over = config, None, None, False
        self._interruption.follow(Path(config["stop_file"]))
        self._began_s = self._newest_end_s = self._setup_s = None

    def _timing(self) -> dict[str, Any]:
        """dead_time_s: what the slot lost between two trials, the engine's own setup before the first step included."""
        known = {"slot": self._slot, "began_s": self._began_s}
        if self._last_end_s is None or self._setup_s is None:
            return known
        return {**known, "dead_time_s": self._began_s - self._last_end_s + self._setup_s}

    def _note_terminated(self) -> None:
        if not self._is_over:
            with suppress(OSError):
                note_terminated(Path(self._spec["trial_folder"]))

    def _advance_or_fail(self) -> dict[str, Any]:
        try:
            return self._advance()
        except Interrupted:
            self._close()
            return _result(Outcome.RUNNING, done=True)
        except DivergedError as error:
            return self._failed(Outcome.DIVERGED, error)
        except Exception as error:  # the boundary: whatever a trial raises, the sweep goes on and says so
            return self._failed(Outcome.OUT_OF_MEMORY if _is_out_of_memory(error) else Outcome.FAILED, error)

    def _advance(self) -> dict[str, Any]:
        if self._interruption.is_asked():
            raise Interrupted("asked to end")
        if self._reports is None:
            self._reports = self._start()
        report = next(self._reports, None)
        if report is None:
            raise RuntimeError("training ended before its last rung")
        if not math.isfinite(report.eval_loss):
            raise DivergedError(f"eval_loss = {report.eval_loss} at rung {report.rung}")
        write_system(Path(self._spec["trial_folder"]), report.rung, self._sampler.take())
        done = report.rung >= self._num_rungs
        if done:
            self._close()
        return _result(Outcome.COMPLETE if done else Outcome.RUNNING, report=report, done=done)

    def _start(self) -> Iterator[TrialReport]:
        config = parse(TrainConfig, json.loads(self._spec["train_config"]))
        self._num_rungs = len(config.train.report_grid())
        trial_folder = Path(self._spec["trial_folder"])
        trial_folder.mkdir(parents=True, exist_ok=True)
        self._lock = _wait_for(trial_folder)
        self._sampler.take()  # what was before this trial
        return self._unheard_and_new(config, trial_folder)

    def _unheard_and_new(self, config: TrainConfig, trial_folder: Path) -> Iterator[TrialReport]:
        """All reports after those the sweep has. A process that died may have saved one, and not lived to pass it on; where it
        had only its checkpoint written, the engine passes that one on before it trains: the verdict may be to stop."""
        heard = self._spec["num_heard"]
        for report in read_reports(trial_folder)[heard:]:
            heard = report.rung
            yield report
        if heard < self._num_rungs:
            train = importlib.import_module(self._spec["engine"]["train"]).train
            base, interrupted = self._resident_base(config), self._interruption.is_asked
            with (
                self._interruption.training(trial_folder),
                closing(train(config, trial_folder, base=base, interrupted=interrupted)) as reports,
            ):
                for report in reports:
                    yield from read_reports(trial_folder)[heard : report.rung - 1]
                    self._setup_s = report.setup_s if self._setup_s is None else self._setup_s
                    if report.rung > heard:  # its file may have been lost after it was heard
                        yield report
                    heard = report.rung

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
        trial_folder = Path(self._spec["trial_folder"])
        with suppress(OSError):  # the disk may be what failed
            (trial_folder / "error.txt").write_text("".join(traceback.format_exception(error)))
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
    report: TrialReport | None = None,
    error: str | None = None,
    memory: dict[str, float] | None = None,
    done: bool,
) -> dict[str, Any]:
    # report and memory travel as text: Tune flattens nested results
    text = json.dumps(report.to_dict()) if report else ""
    return {"outcome": str(outcome), "report": text, "error": error, "memory": json.dumps(memory or {}), "done": done}


def _slot(device: str) -> str:
    """Node and card, or node and process: a chart of the sweep has one line for each."""
    cards = ray.get_gpu_ids() if device == "cuda" else []
    place = f"gpu{cards[0]}" if cards else f"process {os.getpid()}"
    return f"{socket.gethostname()} {place}"


def _memory(error: Exception) -> dict[str, float]:
    """The peaks that the engine knows where memory ran out."""
    peaks = {name: getattr(error, name) for name in ("predicted_gib", "measured_gib")} if isinstance(error, OutOfMemory) else {}
    return {name: peak for name, peak in peaks.items() if peak is not None}


def _is_out_of_memory(error: Exception) -> bool:
    import torch  # here, because the driver imports this module and must not load torch

    # the CPU allocator has no exception of its own
    return isinstance(error, OutOfMemory | torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _load_base(config: TrainConfig, spec: dict[str, Any]) -> Any:
    import torch  # here, for the same reason

    torch.set_num_threads(spec["num_threads"])
    gc.unfreeze()
    gc.collect()  # what a failed trial left behind is freed only now: its traceback held the tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    base = importlib.import_module(spec["engine"]["model"]).load_base(config.model, torch.device(spec["device"]))
    gc.collect()
    gc.freeze()  # the engine collects after each trial: let it walk through what the trial left, not through model and libraries
    return base


def _wait_for(trial_folder: Path) -> FileLock:
    """Hold the trial's folder: a worker of a killed driver may live on for seconds, and two must not write one checkpoint."""
    deadline = time.monotonic() + LOCK_PATIENCE_S
    lock = FileLock(trial_folder / ".lock")
    while not lock.acquire():
        if time.monotonic() > deadline:
            raise RuntimeError(f"another process has held {trial_folder} for {LOCK_PATIENCE_S:.0f} s")
        time.sleep(0.2)
    return lock
