"""Free the disk of what a sweep needs no more: `python -m sweep.tidy <sweep folder>`.

The command says what it would remove, and removes it with --yes. It keeps what a resume, a paused
trial or the winner needs: checkpoints of trials that may go on, adapters of trials that may win,
best/, journal and reports. A driver tidies up itself; this is for older sweeps, for what a kill left,
and for the adapters that can no longer win.
"""

from __future__ import annotations

import sweep.cli.no_foreign_modules  # noqa: F401 (must be the first)

# isort: split
import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from engine.system.command_line import run
from engine.units import counted
from sweep.folder.litter import checkpoints, freed_bytes, unused_starts
from sweep.folder.sweep_folder import SweepFolder
from sweep.study.journal import mend_journal, read_records
from sweep.text import bytes_text
from sweep.trials.record import CONTENDERS, GOING_ON, TrialRecord

SHOWN = 20  # lines; more are counted


@dataclass(frozen=True)
class Litter:
    """Hold folders that may go, with the reason in a few words."""

    folders: tuple[Path, ...]
    reason: str


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 bad input."""
    return run(lambda: _main(_options(arguments)))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sweep.tidy", description="Free the disk of what a sweep needs no more.")
    parser.add_argument("folder", help="sweep folder")
    parser.add_argument("--yes", action="store_true", help="remove it; without, only say what would be removed")
    parser.add_argument("--adapters", action="store_true", help="also the adapters of trials that cannot win")
    return parser.parse_args(arguments)


def _main(options: argparse.Namespace) -> int:
    folder = SweepFolder.open(options.folder, "folder")
    with folder.lock("folder") if options.yes else nullcontext():
        if options.yes:
            mend_journal(folder)
        found = list(find_litter(folder, options.adapters))
        places = [place for litter in found for place in litter.folders]
        freed = freed_bytes(places)
        for litter in found[:SHOWN]:
            names = ", ".join(str(place.relative_to(folder.path)) for place in litter.folders)
            print(f"{bytes_text(freed_bytes(litter.folders)):>10}  {names}  ({litter.reason})")
        if len(found) > SHOWN:
            print(f"{'':10}  and {len(found) - SHOWN:,} more")
        if not found:
            print("nothing to remove: each checkpoint and adapter here is still of use")
        elif options.yes:
            for place in places:
                shutil.rmtree(place)
            print(f"removed {counted(len(places), 'folder')}: {bytes_text(freed)} are free again")
        else:
            print(f"{bytes_text(freed)} could be free again; --yes removes these {counted(len(places), 'folder')}")
    return 0


def find_litter(folder: SweepFolder, adapters: bool = False) -> Iterator[Litter]:
    """Yield what may be removed. adapters: also those of trials that cannot win.

    Raises InputError for a damaged journal. A trial that the journal does not know is left alone.
    """
    for own in (folder, SweepFolder(folder.final_seeds)):
        for record in read_records(own, lambda params: {})[1]:
            places = tuple(_unused(own.trial(record.number), record, adapters))
            if places:
                yield Litter(places, f"trial {record.number} is {record.outcome}")
        if own.ray.is_dir() and not own.ray.is_symlink():
            yield Litter((own.ray,), "Ray Tune's own files, which nothing reads")


def _unused(trial_folder: Path, record: TrialRecord, adapters: bool) -> Iterator[Path]:
    yield from unused_starts(trial_folder, record)
    if record.outcome not in GOING_ON:
        yield from (place for place in checkpoints(trial_folder) if place.is_dir() and not place.is_symlink())
        adapter = trial_folder / "adapter"
        if adapters and record.outcome not in CONTENDERS and adapter.is_dir() and not adapter.is_symlink():
            yield adapter


if __name__ == "__main__":
    sys.exit(main())
