"""Define an adapter's losses on each evaluation sample, and the file that keeps them. No torch.

`sample_losses.json` in a trial's folder belongs to the adapter in `adapter/` beside it. Two adapters
compare sample by sample if the digests of their evaluation sets are equal.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.parsing import parse_dataclass
from engine.errors import InputError
from engine.system.files import write_text
from engine.trial_report import TrialReport

SAMPLE_LOSSES = "sample_losses.json"


@dataclass(frozen=True)
class SampleLosses:
    """Hold the losses of one adapter on the samples of one evaluation set, in the set's order.

    evaluation_digest: 16 hex digits of the samples' tokens and targets at the evaluated length.
    sums: nats, summed over the target tokens of each sample [N]. num_targets: the number of these
    tokens [N].
    """

    evaluation_digest: str
    sums: tuple[float, ...]
    num_targets: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Return the eval loss: mean nats per target token over all samples."""
        return math.fsum(self.sums) / sum(self.num_targets)


@dataclass(frozen=True)
class _SampleLossFile:
    rung: int
    evaluation_digest: str
    sums: tuple[float, ...]
    num_targets: tuple[int, ...]


def write_sample_losses(trial_folder: Path, rung: int, losses: SampleLosses) -> None:
    """Write the file, whole or not at all. rung: that of the adapter in `adapter/`."""
    values = {"rung": rung, "evaluation_digest": losses.evaluation_digest, "sums": losses.sums, "num_targets": losses.num_targets}
    write_text(trial_folder / SAMPLE_LOSSES, json.dumps(values, separators=(",", ":")) + "\n")


def read_sample_losses(trial_folder: Path, report: TrialReport) -> SampleLosses | None:
    """Return the losses of the adapter that `report` tells of, or None if an older version wrote none.

    Raises InputError if the file is damaged, or belongs to another report: its sums must give that
    report's eval_loss to the last bit.
    """
    file = trial_folder / SAMPLE_LOSSES
    if not file.is_file():
        return None
    try:
        found = parse_dataclass(_SampleLossFile, _lists_as_tuples(json.loads(file.read_bytes())), "losses")
    except InputError as error:
        raise _damaged(file, str(error)) from None
    except (ValueError, RecursionError):
        raise _damaged(file, "it is not valid JSON") from None
    if len(found.sums) != len(found.num_targets) or min(found.num_targets, default=0) < 0 or not any(found.num_targets):
        raise _damaged(file, "its sums and counts do not match")
    losses = SampleLosses(found.evaluation_digest, found.sums, found.num_targets)
    if found.rung != report.rung or losses.mean != report.eval_loss:
        raise _damaged(file, f"it is of rung {found.rung} with loss {losses.mean:.6g}")
    return losses


def _lists_as_tuples(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _damaged(file: Path, fault: str) -> InputError:
    allowed = f"must hold the sample losses of the adapter beside it, but {fault}; remove the file"
    return InputError(str(file), SAMPLE_LOSSES, allowed)
