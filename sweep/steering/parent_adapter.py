"""Check whether a trial can begin with another one's adapter, and copy that adapter for it.

The copy lies in the clone's own folder before the journal has the command, so nothing that happens
to the parent later can change or lose it. The engine checks the copy's digest whenever it reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.config.parsing import parse
from engine.config.trial import LoraConfig, TrainConfig
from engine.errors import InputError, StorageError
from engine.sample_losses import newest_rung
from engine.sources.identity import ADAPTER_FILES, identify_start
from engine.system.files import link_or_copy, write_folder
from sweep.folder.sweep_folder import SweepFolder
from sweep.steering.command import Command
from sweep.trials.record import TrialRecord
from sweep.trials.warm_from import WarmFrom

ADAPTER = "adapter"
NONE_YET = "has no adapter yet: its first report writes one; leave --warm out to start from zero"
UNDATED = "is saving a better adapter just now, or a kill cut that off: send the command again"


def why_no_adapter(record: TrialRecord) -> str | None:
    """Return why no trial can begin with this one's adapter, or None if its files are there."""
    if record.source is not None:
        return f"trial {record.number} is of an earlier sweep, {record.source}: its adapter is not here"
    if not record.reports:
        return f"trial {record.number} {NONE_YET}"
    if not all((Path(record.folder) / ADAPTER / name).is_file() for name in ADAPTER_FILES):
        return f"the adapter of trial {record.number} has been removed; leave --warm out to start from zero"
    return None


def check_parent(command: Command, record: TrialRecord, parent: TrainConfig, clone: TrainConfig) -> None:
    """Raise InputError if the clone cannot begin with the parent's adapter. parent, clone: whole configs."""
    if (why := why_no_adapter(record)) is not None:
        raise command.refused(why)
    number, old, new = record.number, parent.lora, clone.lora
    if clone.learns_pairs:
        raise command.refused("the losses of pairs have the start as their reference, so those of a warm clone do not compare")
    if old.use_dora:
        raise command.refused(f"trial {number} has a DoRA adapter, and a start has A and B alone")
    if _names(old) != _names(new):
        layers = f"trial {number} adapts {_text(old)}, and this point {_text(new)}"
        raise command.refused(f"{layers}: a warm clone adapts the same layers")
    if old.rank * old.halves > new.rank or dict(old.rank_pattern) != dict(new.rank_pattern):
        least = f"lora.rank={old.rank * old.halves} or more" + (", and its lora.rank_pattern" if old.rank_pattern else "")
        raise command.refused(f"the adapter of trial {number} has a larger rank than lora.rank = {new.rank}: take {least}")
    try:
        start = WarmFrom(number, 0, "0" * 16)
        parse(TrainConfig, start.put_into(clone.model_dump(mode="json"), Path(record.folder) / ADAPTER))
    except InputError as error:
        raise command.refused(f"{error.field} = {error.value!r}: {error.allowed}") from None


def keep_start(command: Command, record: TrialRecord, folder: SweepFolder, number: int) -> WarmFrom:
    """Copy the parent's adapter for trial `number`, which begins with it. Returns what the journal keeps of it.

    record: the parent as its folder tells it now. Raises InputError if the parent is saving another
    adapter meanwhile, or if the disk takes no copy.
    """
    source, start = Path(record.folder) / ADAPTER, folder.start(number)

    def fill(target: Path) -> None:
        for name in ADAPTER_FILES:
            link_or_copy(source / name, target / name)

    try:
        write_folder(start, fill)
        # its losses are written before an adapter and its report after it: one rung in both is that of the copy
        if newest_rung(Path(record.folder)) not in (None, record.kept.rung):
            raise command.refused(f"trial {record.number} {UNDATED}")
        return WarmFrom(record.number, record.kept.tokens_seen, _digest(start))
    except (OSError, StorageError) as error:
        raise command.refused(f"the adapter of trial {record.number} cannot be copied ({error})") from None


def _digest(start: Path) -> str:
    return identify_start(LoraConfig(start_from=str(start.absolute())))["adapter"]


def _names(lora: LoraConfig) -> str | tuple[str, ...]:
    return lora.target_modules if isinstance(lora.target_modules, str) else tuple(sorted(lora.target_modules))


def _text(lora: LoraConfig) -> str:
    names: Any = _names(lora)
    return names if isinstance(names, str) else f"[{','.join(names)}]"
