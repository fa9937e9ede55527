"""Define an adapter's losses on each evaluation sample, and the file that keeps them. No torch.

`sample_losses.json` in a trial's folder belongs to the adapter in `adapter/` beside it. A file and a
folder cannot be replaced at once, so it holds the adapter before as well, and is written first: a
crash at any moment leaves the losses of the adapter that is there. Two adapters compare sample by
sample if the digests of their evaluation sets are equal.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from engine.config.metrics_section import PREFERENCE_ACCURACY
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
    tokens [N]. sets: number of samples in each evaluation set, whose samples follow each other;
    empty if there is one. weights: those of the sets in the eval loss. margins: if the samples are
    pairs of answers, the reward of each chosen one less that of the rejected one; a pair has one
    target then, its preference loss.
    """

    evaluation_digest: str
    sums: tuple[float, ...]
    num_targets: tuple[int, ...]
    sets: dict[str, int] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    margins: tuple[float, ...] = ()

    @property
    def preference_accuracy(self) -> float | None:
        """Return the share of pairs with a margin above 0, or the sets' weighted mean; None if samples are no pairs."""
        return 0.0 - self.accuracy_costs().mean if self.margins else None  # 0.0 of the base, not -0.0

    @property
    def preference_metrics(self) -> dict[str, float]:
        """Return preference_accuracy as a report has it among the metrics; empty if samples are no pairs."""
        return {PREFERENCE_ACCURACY: self.preference_accuracy} if self.margins else {}

    def accuracy_costs(self) -> SampleLosses:
        """Return -1 for each pair with a margin above 0, and 0 for the others, as sums of one target each."""
        return replace(self, sums=tuple(-float(margin > 0.0) for margin in self.margins), margins=())

    @property
    def mean(self) -> float:
        """Return the eval loss: mean nats per target token over all samples, or the weighted mean of the sets'."""
        if not self.sets:
            return math.fsum(self.sums) / sum(self.num_targets)
        means = self.means  # a set without weight may have any loss, infinity too
        parts = [means[name] * weight for name, weight in self.weights.items() if weight]
        return math.fsum(parts) / math.fsum(self.weights.values())

    @property
    def means(self) -> dict[str, float]:
        """Return the mean nats per target token of each evaluation set; empty if there is one."""
        return {
            name: math.fsum(self.sums[part]) / sum(self.num_targets[part]) for name, part in self.parts().items() if self.sets
        }

    def parts(self) -> dict[str, slice]:
        """Return the places of each set's samples; those of all, without a name, if there is one set."""
        found, start = {}, 0
        for name, number in (self.sets or {"": len(self.sums)}).items():
            found[name] = slice(start, start + number)
            start += number
        return found


@dataclass(frozen=True, kw_only=True)
class _OfRung(SampleLosses):
    rung: int


def write_sample_losses(trial_folder: Path, rung: int, losses: SampleLosses) -> None:
    """Write the losses of the adapter that comes into `adapter/` next, beside those of the one that is there.

    The file is replaced as a whole or not at all. rung: that of the adapter.
    """
    try:
        before = [one for one in _read(trial_folder / SAMPLE_LOSSES) if one.rung != rung][-1:]
    except (InputError, OSError):
        before = []  # the first one, or a damaged file, which this one replaces
    new = _OfRung(**vars(losses), rung=rung)
    text = json.dumps({"adapters": [asdict(one) for one in (*before, new)]}, separators=(",", ":"))
    write_text(trial_folder / SAMPLE_LOSSES, text + "\n")


def newest_rung(trial_folder: Path) -> int | None:
    """Return the rung of the newest losses in the folder: they are written before their adapter and its report.

    None if there are none, or if they are damaged.
    """
    try:
        return _read(trial_folder / SAMPLE_LOSSES)[-1].rung
    except (InputError, OSError):
        return None


def read_sample_losses(trial_folder: Path, report: TrialReport) -> SampleLosses | None:
    """Return the losses of the adapter that `report` tells of, or None if an older version wrote none.

    Raises InputError if the file is damaged, or belongs to another report: its sums must give that
    report's eval_loss to the last bit.
    """
    file, others = trial_folder / SAMPLE_LOSSES, []
    if not file.is_file():
        return None
    for one in _read(file):
        if one.rung == report.rung and one.mean == report.eval_loss:
            return SampleLosses(one.evaluation_digest, one.sums, one.num_targets, one.sets, one.weights, one.margins)
        others.append(f"of rung {one.rung} with loss {one.mean:.6g}")
    raise _damaged(file, f"it is {' and '.join(others)}")


def _read(file: Path) -> list[_OfRung]:
    """Return what the file has of one adapter or two. Raises InputError if it is damaged."""
    try:
        values = json.loads(file.read_bytes())
        adapters = values.get("adapters") if isinstance(values, dict) else None
        found = [parse_dataclass(_OfRung, one, "adapters") for one in adapters or ()]
    except InputError as error:
        raise _damaged(file, str(error)) from None
    except (TypeError, ValueError, RecursionError):
        raise _damaged(file, "it is not valid JSON of lists") from None
    if not found:
        raise _damaged(file, "it has no adapters")
    for one in found:
        if len(one.sums) != len(one.num_targets) or min(one.num_targets, default=0) < 0 or not any(one.num_targets):
            raise _damaged(file, "its sums and counts do not match")
        if one.margins and len(one.margins) != len(one.sums):
            raise _damaged(file, "its sums and margins do not match")
        if one.sets and not _fits_its_sets(one):
            raise _damaged(file, "its evaluation sets do not match its sums")
    return found


def _fits_its_sets(one: SampleLosses) -> bool:
    has_targets = all(any(one.num_targets[part]) for part in one.parts().values())
    has_weight = min(one.weights.values(), default=0.0) >= 0.0 and any(one.weights.values())
    return sum(one.sets.values()) == len(one.sums) and set(one.sets) == set(one.weights) and has_targets and has_weight


def _damaged(file: Path, fault: str) -> InputError:
    allowed = f"must hold the sample losses of the adapter beside it, but {fault}; remove the file"
    return InputError(str(file), SAMPLE_LOSSES, allowed)
