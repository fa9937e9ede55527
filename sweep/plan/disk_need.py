"""Predict the disk that a sweep needs, and refuse one whose disk cannot hold it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.command_answers import PreparedFacts
from engine.config.trial import TrainConfig
from engine.errors import InputError
from engine.units import counted
from sweep.config.sweep import NUM_FINALISTS
from sweep.folder.litter import freed_bytes, num_starts
from sweep.plan.sweep_plan import SweepPlan
from sweep.text import bytes_text

FIELD = "sweep.output_dir"
VALUE = 4  # bytes of a parameter: adapters are fp32
COPIES = 3  # a trial in training has its last checkpoint, the one before, and the one that it writes
TOKENIZER = ("tokenizer*", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class DiskNeed:
    """Hold the bytes that the sweep folder grows to.

    least: with the smallest adapters of the space, as few trials as the budget may leave, and one
    checkpoint a slot. most: with the largest adapters everywhere. adapters, starts, checkpoints:
    parts of `most`. starts: what warm clones began with, which shares its bytes with the parent's
    adapter only until the parent saves a better one. num_trials, num_resting: trials in `most`, and
    checkpoints that exist at once.
    """

    least: float
    adapters: float
    starts: float
    checkpoints: float
    num_trials: int
    num_resting: int

    @property
    def most(self) -> float:
        return self.adapters + self.starts + self.checkpoints


def disk_need(plan: SweepPlan, facts: PreparedFacts, num_warm: int = 0) -> DiskNeed | None:
    """Return what the sweep needs. None if the engine counted no parameters.

    num_warm: warm clones among the sweep's trials. They may be at points that other trials have.
    """
    probes = list(zip(plan.probes(), facts.num_trainable))
    if not probes:
        return None
    config, slots, on_gpu = plan.config, plan.slots.num_slots, plan.slots.device == "cuda"
    # parameters are rank x features of the targets, and a probe changes one of the two; a frozen half is in the files too
    ranks = [one.lora.rank for one, _ in probes]
    features = [count * one.lora.halves / one.lora.rank for one, count in probes]
    fewest, largest = min(ranks) * min(features), max(ranks) * max(features)
    states = [_state_bytes(one, on_gpu) for one, _ in probes]
    tokenizer = _tokenizer_bytes(Path(facts.model_path))
    budget, size = config.effective_budget, plan.space.size()
    trials = config.sweep.num_trials if size is None else min(config.sweep.num_trials, size + num_warm)
    finals = NUM_FINALISTS * max(config.sweep.final_seeds - 1, 0)
    can_end_early = (budget.gpu_hours, budget.wall_clock_hours, budget.target_loss) != (None, None, None)
    surely = min(trials, int(budget.full_trials or trials)) if not can_end_early else min(trials, slots)
    resting = min(slots, trials)
    if config.pauses_trials:  # a paused trial keeps its checkpoints
        resting = max(resting, min(trials, config.most_tokens // config.train.report_grid()[0]))
    return DiskNeed(
        least=max(surely, 1) * (fewest * VALUE + tokenizer) + min(slots, surely) * fewest * min(states),
        adapters=(trials + finals + 1) * (largest * VALUE + tokenizer),  # best/ is a copy
        starts=num_warm * largest * VALUE,
        checkpoints=resting * COPIES * largest * max(states),
        num_trials=trials,
        num_resting=resting,
    )


def check_disk(
    plan: SweepPlan, facts: PreparedFacts, sweep_folder: Path | None, say: Callable[[str], None]
) -> list[str]:
    """Say what disk the sweep needs. Returns a warning where the disk may be too small.

    sweep_folder: None for a new sweep; what an older one holds already is not needed again. Raises
    InputError if even the least that the sweep needs is not free.
    """
    num_warm = 0 if sweep_folder is None else num_starts(sweep_folder)
    need = disk_need(plan, facts, num_warm)
    if need is None:
        return []
    place = Path(plan.config.sweep.output_dir) if sweep_folder is None else sweep_folder
    free = shutil.disk_usage(next(folder for folder in (place, *place.absolute().parents) if folder.exists())).free
    held = 0 if sweep_folder is None else freed_bytes([sweep_folder])
    starts = f"starts of {counted(num_warm, 'warm clone')} {bytes_text(need.starts)}, " if num_warm else ""
    parts = (
        f"adapters of {counted(need.num_trials, 'trial')} {bytes_text(need.adapters)}, {starts}"
        f"checkpoints of {need.num_resting:,} at once {bytes_text(need.checkpoints)}"
    )
    has = f"; {bytes_text(held)} of it are there" if held else ""
    say(f"disk       at most {bytes_text(need.most)} ({parts}){has}; {bytes_text(free)} free")
    if need.least - held > free:
        allowed = f"must have {bytes_text(need.least - held)} free at least, and has {bytes_text(free)}"
        raise InputError(FIELD, str(place), f"{allowed}: make room, name a folder on another disk, or lower sweep.num_trials")
    full = "the disk may fill up before the sweep ends; a full disk ends it without loss, and a resume goes on"
    return [full] if need.most - held > free else []


def _state_bytes(config: TrainConfig, on_gpu: bool) -> float:
    """Return the bytes of one checkpoint for each parameter: adapter, optimizer, running average."""
    optim = config.optim
    has_8bit_states = optim.has_8bit_states and (on_gpu or optim.name != "auto")
    moments = optim.num_states * (1 if has_8bit_states else VALUE)
    return VALUE + moments + (VALUE if optim.ema_horizon is not None else 0)


def _tokenizer_bytes(model: Path) -> int:
    """Return the size of the tokenizer's files, which each adapter has too; 0 where the model is not here."""
    names = {file for pattern in TOKENIZER for file in model.glob(pattern)} if model.is_dir() else set()
    return sum(os.stat(file).st_size for file in names if file.is_file())
