"""Train one trial after another in one process, with the base model resident.

The worker is a Trainable class, not a function, because Tune reuses only classes: a no-op trial
held its slot 8.45 s without reuse, and 0.087 s with it. No trial may end the worker: every
exception becomes an outcome, and the next trial runs.
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
from engine.sources.identity import is_input_fault
from engine.system.file_lock import FileLock
from engine.system.files import storage_fault
from engine.trial_report import MODEL, START, WAITING, PartClock, TrialReport, read_reports
from sweep.execution.interruption import Interruption
from sweep.execution.worker_process import settle_process
from sweep.folder.notes import LEAVE, note_terminated
from sweep.folder.steady_clock import since_boot
from sweep.tracking.system_metrics import SystemSampler, machine_reader, write_system
from sweep.trials.record import Outcome

LOCK_PATIENCE_S = 60.0
TRACE_BEFORE_KILL_S = 1.0
# libraries write caches too, and only engine.system.files turns these faults into StorageError
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class TrialWorker(Trainable):
    """Train a trial; each step() trains to the next rung and returns a result.

    A result has outcome, done and error (one line or None). It also has three JSON texts: report
    (may be empty), timing (see timeline.Span) and memory. If memory ran out, the last one has
    predicted_gib and measured_gib.

    done with outcome RUNNING has two meanings. With an error, the disk is full or, if
    has_changed_inputs is True, data or base model are not those of the sweep's start. That is no
    trial's fault: it continues from its last checkpoint when the user resumes the sweep. Without an
    error, the driver asked the trial to end, and it is saved. After SIGTERM the trial is saved too,
    and the process ends.
    """

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
            self._began_s, self._began_steady_s = time.time(), since_boot()
            self._parts = PartClock(clock=since_boot)
        self._parts.enter(START)  # the engine enters the parts that it knows
        timeout_s = self._spec["report_timeout_s"]
        if timeout_s is not None:
            # the driver kills a worker that hangs: before, write where it hangs into Ray's log
            faulthandler.dump_traceback_later(max(timeout_s - TRACE_BEFORE_KILL_S, 0.1))
        try:
            with self._interruption.working():
                result = self._advance_or_fail()
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._release()  # if the trial pauses now, another worker may go on with it
        if self._interruption.is_terminated:  # the trial's next process passes on its reports
            self._note_terminated()
            raise SystemExit("its process was asked to end (SIGTERM)")
        self._is_over = result["done"]
        self._newest_end_s = since_boot()
        self._parts.enter(WAITING)
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
        self._inputs: dict[str, str] = json.loads(config.get("inputs", "{}"))
        self._interruption.follow(Path(config["stop_file"]), Path(config["trial_folder"], LEAVE))
        self._began_s = self._newest_end_s = self._setup_s = None

    def _timing(self) -> dict[str, Any]:
        """Return slot, began_s, parts and, if known, dead_time_s.

        parts: what the seconds since the last call were spent on. dead_time_s: seconds that the
        slot lost between two trials, including the engine's setup before the first step.
        """
        known = {"slot": self._slot, "began_s": self._began_s, "parts": self._parts.take()}
        if self._last_end_s is None or self._setup_s is None:
            return known
        return {**known, "dead_time_s": self._began_steady_s - self._last_end_s + self._setup_s}

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
        except Exception as error:  # the sweep survives any error of a trial, and reports it
            return self._failed(Outcome.OUT_OF_MEMORY if _is_out_of_memory(error) else Outcome.FAILED, error)

    def _advance(self) -> dict[str, Any]:
        if self._interruption.is_asked():
            raise Interrupted("asked to end")
        if self._lock is None:
            self._lock = _wait_for(Path(self._spec["trial_folder"]))
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
        self._sampler.take()  # drop the samples from before this trial
        return self._unheard_and_new(config, Path(self._spec["trial_folder"]))

    def _unheard_and_new(self, config: TrainConfig, trial_folder: Path) -> Iterator[TrialReport]:
        """Yield all reports that the sweep does not have yet, then train on.

        A process that died may have saved a report without passing it on. If it wrote only the
        checkpoint, the engine yields that report before it trains: the pruner may stop the trial.
        """
        heard = self._spec["num_heard"]
        for report in read_reports(trial_folder)[heard:]:
            heard = report.rung
            yield report
        if heard < self._num_rungs:
            train = importlib.import_module(self._spec["engine"]["train"]).train
            base, options = self._resident_base(config), {"interrupted": self._interruption.is_asked, "parts": self._parts}
            if self._inputs:
                options["inputs"] = self._inputs
            with (
                self._interruption.training(trial_folder),
                closing(train(config, trial_folder, base=base, **options)) as reports,
            ):
                for report in reports:
                    yield from read_reports(trial_folder)[heard : report.rung - 1]
                    self._setup_s = report.setup_s if self._setup_s is None else self._setup_s
                    if report.rung > heard:  # the file may be lost after the sweep has its reports
                        yield report
                    heard = report.rung

    def _resident_base(self, config: TrainConfig) -> Any:
        """Return the base model. Load it again only if the model section or the device changed."""
        key = (config.model, self._spec["device"])
        if self._base_key != key:
            self._base, self._base_key = None, None
            with self._parts.part(MODEL):
                self._base = _load_base(config, self._spec)
            self._base_key = key
        return self._base

    def _failed(self, outcome: Outcome, error: Exception) -> dict[str, Any]:
        has_changed_inputs = is_input_fault(error, self._inputs)
        if isinstance(error, StorageError) or storage_fault(error) in DISK_FAULTS or has_changed_inputs:
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
            # the state of the model or of the allocator is in doubt: load the model again
            self._base, self._base_key = None, None
        return {**_result(outcome, error=text[:500], memory=memory, done=True), "has_changed_inputs": has_changed_inputs}

    def _close(self) -> None:
        reports, self._reports = self._reports, None
        try:
            if reports is not None:
                reports.close()
        finally:
            self._release()

    def _release(self) -> None:
        """Release the trial's lock, which is held inside a step alone."""
        lock, self._lock = self._lock, None
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
    # Tune flattens nested results, so report and memory travel as text
    text = json.dumps(report.to_dict()) if report else ""
    return {"outcome": str(outcome), "report": text, "error": error, "memory": json.dumps(memory or {}), "done": done}


def _slot(device: str) -> str:
    """Name the slot by node and card, or by node and process. A chart has one line for each."""
    cards = ray.get_gpu_ids() if device == "cuda" else []
    place = f"gpu{cards[0]}" if cards else f"process {os.getpid()}"
    return f"{socket.gethostname()} {place}"


def _memory(error: Exception) -> dict[str, float]:
    """Return the peaks in GiB that the engine knows if memory ran out."""
    peaks = {name: getattr(error, name) for name in ("predicted_gib", "measured_gib")} if isinstance(error, OutOfMemory) else {}
    return {name: peak for name, peak in peaks.items() if peak is not None}


def _is_out_of_memory(error: Exception) -> bool:
    import torch  # the driver imports this module and must not load torch

    # the CPU allocator raises a plain RuntimeError
    return isinstance(error, OutOfMemory | torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _load_base(config: TrainConfig, spec: dict[str, Any]) -> Any:
    settle_process(spec)
    import torch  # the driver imports this module and must not load torch

    gc.unfreeze()
    # a failed trial's traceback held its tensors: free them now
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    base = importlib.import_module(spec["engine"]["model"]).load_base(config.model, torch.device(spec["device"]))
    gc.collect()
    # the engine collects after each trial, and need not search model and libraries then
    gc.freeze()
    return base


def _wait_for(trial_folder: Path) -> FileLock:
    """Wait for the lock of the trial's folder.

    A killed driver's worker may live on for seconds, and two must not write one checkpoint.
    """
    trial_folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_PATIENCE_S
    lock = FileLock(trial_folder / ".lock")
    while not lock.acquire():
        if time.monotonic() > deadline:
            raise RuntimeError(f"another process has held {lock.holder or trial_folder} for {LOCK_PATIENCE_S:.0f} s")
        time.sleep(0.2)
    return lock
