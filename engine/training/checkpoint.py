"""Save and load what exact resume needs: adapter, optimizer, random state, data cursor, reports.

The adapter is a safetensors file and the state is JSON. Optimizer, random state and the running
average, if there is one, are a torch file that is read with `weights_only`, so loading never runs
code from a file. The adapter for users is a folder of its own (engine/adapter/peft_files.py).

Tensors are staged first, which may happen beside an evaluation. `place` adds the state and replaces
`checkpoint/` atomically; the one before stays as `checkpoint.previous/`. Checksums in `state.json`
reveal a torn checkpoint; the trial then continues from the previous one.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError
from safetensors.torch import load as load_tensors

from engine.adapter.lora import AnyLora, load_adapter_state
from engine.adapter.peft_files import PREFIX, adapter_bytes
from engine.errors import CheckpointError, InputError, first_line
from engine.system.files import drop_outdated, drop_staged, place_folder, settle, stage_folder, staged, write_digested
from engine.trial_report import CHECKPOINT, PREVIOUS_CHECKPOINT, TrialReport

MASKS = "hash"  # engine/adapter/flat.py: a function of seed, step and place
ADAPTER, OPTIMIZER, STATE = "adapter.safetensors", "optimizer.pt", "state.json"
# States of torch's and of bitsandbytes' AdamW that have the parameter's shape.
PER_PARAMETER = ("exp_avg", "exp_avg_sq", "state1", "state2")
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class TornCheckpoint(CheckpointError):
    """Report a checkpoint whose files are missing, truncated or changed."""


@dataclass
class Sums:
    """Hold the sums over the steps since the last report.

    loss: nats, summed over all targets. grad_norm: norm at the last step, not a sum. seconds: in
    steps. recording_s: those of them in which graphs were recorded or kernels compiled.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    loss: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    num_tokens: Count = 0
    num_targets: Count = 0
    num_steps: Count = 0
    seconds: Amount = 0.0
    recording_s: Amount = 0.0
    grad_norm: Amount = 0.0


@dataclass
class Progress:
    """Hold the progress of a trial.

    epoch and position: the data cursor. reports: all reports so far. since_report:
    sums over the steps after the last report. plan: settings chosen after memory ran out, kept so
    that a resumed trial does not run out again. num_out_of_memory: times that memory ran out. masks:
    how dropout's masks were drawn from the first step on; empty if an older version drew them.
    exempt: linear layers that multiply in the working dtype, whatever `train.matmul` says.
    base_eval_losses: the base model's on each evaluation set, if a limit follows them.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    fingerprint: str
    step: Count = 0
    tokens_seen: Count = 0
    target_tokens_seen: Count = 0
    elapsed_s: Amount = 0.0
    epoch: Count = 0
    position: Count = 0
    peak_allocated_gib: Amount = 0.0
    peak_reserved_gib: Amount = 0.0
    num_out_of_memory: Count = 0
    masks: str = ""
    exempt: list[str] = field(default_factory=list)
    base_eval_losses: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    reports: list[Annotated[TrialReport, PlainValidator(TrialReport.from_dict)]] = field(default_factory=list)
    since_report: Sums = field(default_factory=Sums)

    def count_step(self, num_tokens: int, num_targets: int) -> None:
        """Count one more optimizer step."""
        self.step += 1
        self.tokens_seen += num_tokens
        self.target_tokens_seen += num_targets


class Pace:
    """Decide when to save between two reports.

    By default, saving takes at most one percent of the time and happens at most once a minute. A
    process that is killed without warning loses the work since its last save.
    """

    def __init__(self, at_least_s: float = 60.0, share: float = 0.01, clock: Callable[[], float] = time.monotonic) -> None:
        self._at_least_s, self._share, self._clock = at_least_s, share, clock
        self._saved_s, self._wait_s = clock(), at_least_s

    def is_due(self) -> bool:
        return self._clock() - self._saved_s >= self._wait_s

    def saved(self, seconds: float) -> None:
        """Note that a save ended now; its duration decides when the next one is due."""
        self._saved_s = self._clock()
        self._wait_s = max(self._at_least_s, seconds / self._share)


@dataclass(frozen=True)
class Tensors:
    """Hold what a checkpoint restores in place. average: fp32 of the adapter's flat shape, None if there is none."""

    layers: dict[str, AnyLora]
    optimizer: torch.optim.Optimizer
    average: torch.Tensor | None = None


def state_of(tensors: Tensors) -> dict[str, Any]:
    """Return what the checkpoint keeps beside the adapter. The tensors are the trial's own, not copies."""
    average = {} if tensors.average is None else {"average": tensors.average}
    return {"optimizer": tensors.optimizer.state_dict(), "random": _random_state(), **average}


def stage(trial_folder: Path, layers: dict[str, AnyLora], state: dict[str, Any]) -> dict[str, str]:
    """Write a checkpoint's tensors, flushed, where `place` finds them; return their digests.

    May run in a thread, on a stream of its own, while nothing changes these tensors. state: from `state_of`.
    """
    digests: dict[str, str] = {}

    def saved_state() -> memoryview:
        torch.save(state, buffer := io.BytesIO())
        return buffer.getbuffer()

    def fill(folder: Path) -> None:
        # Files are made in memory first. A full disk then raises an OSError with its number, and
        # the checksums describe the intended content.
        digests.update(write_digested(folder, {ADAPTER: lambda: adapter_bytes(layers), OPTIMIZER: saved_state}))

    stage_folder(trial_folder / CHECKPOINT, fill)
    return digests


def place(trial_folder: Path, progress: Progress, digests: dict[str, str]) -> None:
    """Complete the staged tensors by the progress, as `trial_folder/checkpoint`; an existing one becomes the previous one.

    digests: what `stage` returned. They tie the state to its tensors.
    """
    text = json.dumps(asdict(progress) | {"sha256": digests}, sort_keys=True)
    place_folder(trial_folder / CHECKPOINT, {STATE: text}, previous=trial_folder / PREVIOUS_CHECKPOINT)


def staged_adapter(trial_folder: Path) -> Path:
    """Return the flushed file of the staged adapter, in PEFT's format."""
    return staged(trial_folder / CHECKPOINT) / ADAPTER


def warn_of_masks(trial_folder: Path, progress: Progress) -> None:
    """Say that a trial with dropout does not go on as it would have without a stop."""
    if progress.masks != MASKS:
        told = "began in an older version, which drew dropout's masks another way; its losses differ from those without a stop"
        print(f"WARNING: {trial_folder / CHECKPOINT} {told}", file=sys.stderr)


def drop_previous(trial_folder: Path) -> None:
    """Delete `checkpoint.previous`: a finished trial needs only its last checkpoint."""
    shutil.rmtree(trial_folder / PREVIOUS_CHECKPOINT, ignore_errors=True)
    drop_outdated(trial_folder / CHECKPOINT)


def drop_unplaced(trial_folder: Path) -> None:
    """Delete the tensors of a checkpoint that was not completed."""
    drop_staged(trial_folder / CHECKPOINT)


def load(trial_folder: Path, fingerprint: str, tensors: Tensors) -> Progress | None:
    """Restore the tensors and the random state, and return the progress; None if none was saved.

    A torn `checkpoint` falls back to `checkpoint.previous`. Raises CheckpointError if neither is
    complete, or if the checkpoint belongs to another config; nothing has been changed then.
    """
    settle(trial_folder / CHECKPOINT)
    folder, previous = trial_folder / CHECKPOINT, trial_folder / PREVIOUS_CHECKPOINT
    if not folder.is_dir() and not previous.is_dir():
        return None
    try:
        return _load(folder, fingerprint, tensors)
    except TornCheckpoint as torn:
        if not previous.is_dir():
            raise TornCheckpoint(f"{torn}; remove the folder to start this trial again") from None
        progress = _load(previous, fingerprint, tensors)
        print(f"WARNING: {torn}; continuing from {previous}, which has {len(progress.reports)} reports", file=sys.stderr)
        # Otherwise the next save would keep the torn one as the previous good one.
        shutil.rmtree(folder, ignore_errors=True)
        return progress


def _load(folder: Path, fingerprint: str, tensors: Tensors) -> Progress:
    links = [path for path in (folder, *(folder / name for name in (ADAPTER, OPTIMIZER, STATE))) if path.is_symlink()]
    if links:
        raise CheckpointError(f"{links[0]} is a link; a checkpoint must be a folder of regular files")
    state, files = _read_state(folder), _read_files(folder)
    if state.pop("sha256", None) != {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}:
        raise TornCheckpoint(f"{folder}: checksums differ from those in {STATE}")
    if state.get("fingerprint") != fingerprint:
        raise CheckpointError(f"{folder} belongs to config {state.get('fingerprint')}, not to {fingerprint}")
    progress = _progress(folder, state)
    try:
        # older versions wrote the names without PEFT's prefix
        adapter = {name.removeprefix(PREFIX): tensor for name, tensor in load_tensors(files[ADAPTER]).items()}
        saved = torch.load(io.BytesIO(files[OPTIMIZER]), weights_only=True, map_location="cpu")
        _check_shapes(saved, tensors)
        load_adapter_state(tensors.layers, adapter, str(folder))
        tensors.optimizer.load_state_dict(saved["optimizer"])
        if tensors.average is not None:
            tensors.average.copy_(saved["average"])
        _restore_random_state(saved["random"])
    except InputError as error:
        raise CheckpointError(str(error)) from None
    except pickle.UnpicklingError:  # torch's own message advises loading without the check
        raise CheckpointError(f"{folder}/{OPTIMIZER} holds more than tensors and numbers, so it was not loaded") from None
    except Exception as error:  # the checksums match: not torn, but made by something else
        raise CheckpointError(f"{folder} is not a checkpoint of this program ({first_line(error)})") from None
    return progress


def _progress(folder: Path, state: dict[str, Any]) -> Progress:
    """Return the checked state; its counts must agree with its last report."""
    try:  # strict validation accepts a dict for a dataclass only from JSON
        progress = TypeAdapter(Progress).validate_json(json.dumps(state))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise CheckpointError(f"{folder}/{STATE}: written by another version, or changed ({where}: {fault['msg']})") from None
    except InputError as error:
        raise CheckpointError(f"{folder}/{STATE}: written by another version, or changed ({error})") from None
    rungs, since = [report.rung for report in progress.reports], progress.since_report
    last = (progress.reports[-1].tokens_seen, progress.reports[-1].step) if rungs else (0, 0)
    reported = (progress.tokens_seen - since.num_tokens, progress.step - since.num_steps)
    if rungs != list(range(1, len(rungs) + 1)) or reported != last:
        raise CheckpointError(f"{folder}/{STATE}: its reports do not match its step and token counts")
    return progress


def _check_shapes(saved: dict[str, Any], tensors: Tensors) -> None:
    """Raise ValueError for wrong shapes: load_state_dict accepts them, but the first step fails."""
    parameters = [p for group in tensors.optimizer.param_groups for p in group["params"]]
    average = saved.get("average")
    if getattr(average, "shape", None) != getattr(tensors.average, "shape", None):
        raise ValueError("its running average has another shape")
    for index, values in saved["optimizer"]["state"].items():
        for name in set(PER_PARAMETER) & set(values):
            if values[name].shape != parameters[index].shape:
                raise ValueError(f"{name} has shape {tuple(values[name].shape)}, not {tuple(parameters[index].shape)}")


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise TornCheckpoint(f"{folder}/{STATE}: cannot be read ({first_line(error)})") from None
    if not isinstance(state, dict):
        raise TornCheckpoint(f"{folder}/{STATE}: must be a JSON object")
    return state


def _read_files(folder: Path) -> dict[str, bytes]:
    try:
        return {name: (folder / name).read_bytes() for name in (ADAPTER, OPTIMIZER)}
    except OSError as error:
        raise TornCheckpoint(f"{folder}: cannot be read ({error.strerror}: {error.filename})") from None


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
