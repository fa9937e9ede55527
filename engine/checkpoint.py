"""What exact resume needs, on disk: adapter, optimizer, random state, data cursor, reports. Safetensors, JSON, and a
`weights_only` torch file for optimizer and random state: loading runs no code from the file.

Not the adapter that users take away; that is `export.py`. `checkpoint/` is replaced atomically, and a checksum of every file
in `state.json` tells a torn one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError
from engine.files import settle, write_folder
from engine.lora import LoraLinear, adapter_state, load_adapter_state

FOLDER = "checkpoint"


@dataclass
class Progress:
    """How far a trial is. epoch and position: the data cursor; reports: all so far, as plain data; plan: settings that a lack of
    memory led to, kept so that a resume does not run into it again; num_out_of_memory: how often it did."""

    fingerprint: str
    step: int = 0
    tokens_seen: int = 0
    target_tokens_seen: int = 0
    elapsed_s: float = 0.0
    epoch: int = 0
    position: int = 0
    peak_allocated_gib: float = 0.0
    num_out_of_memory: int = 0
    plan: dict[str, Any] = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)


def save(run_dir: Path, progress: Progress, layers: dict[str, LoraLinear], optimizer: torch.optim.Optimizer) -> None:
    """Write `run_dir/checkpoint`."""

    def fill(folder: Path) -> None:
        save_file({k: v.contiguous() for k, v in adapter_state(layers).items()}, folder / "adapter.safetensors")
        torch.save({"optimizer": optimizer.state_dict(), "random": _random_state()}, folder / "optimizer.pt")
        state = asdict(progress) | {"sha256": _digests(folder)}
        (folder / "state.json").write_text(json.dumps(state, sort_keys=True))

    write_folder(run_dir / FOLDER, fill)


def load(run_dir: Path, fingerprint: str, layers: dict[str, LoraLinear], optimizer: torch.optim.Optimizer) -> Progress | None:
    """Restore everything from `run_dir/checkpoint`; None where there is none. CheckpointError if it is torn or not ours."""
    settle(run_dir / FOLDER)
    folder = run_dir / FOLDER
    if not folder.is_dir():
        return None
    state = _read_state(folder)
    if state.pop("sha256", None) != _digests(folder):
        raise CheckpointError(f"{folder}: checksums differ from state.json; remove the folder to start this trial again")
    try:
        progress = Progress(**state)
    except TypeError as error:
        raise CheckpointError(f"{folder}/state.json: written by another version ({error})") from None
    if progress.fingerprint != fingerprint:
        raise CheckpointError(f"{folder} belongs to config {progress.fingerprint}, not to {fingerprint}")
    load_adapter_state(layers, load_file(folder / "adapter.safetensors"), str(folder))
    saved = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
    optimizer.load_state_dict(saved["optimizer"])
    _restore_random_state(saved["random"])
    return progress


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/state.json: cannot be read ({error})") from None


def _digests(folder: Path) -> dict[str, str]:
    names = ("adapter.safetensors", "optimizer.pt")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names if (folder / name).is_file()}


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
