"""Lay out which trials are recorded, and in which order.

The main design of each task is a scrambled Sobol sequence, so that its first points alone spread
over the space too. It was drawn once (`SobolEngine(6, scramble=True, seed=18)` of torch 2.13) and
is kept, because another version may draw other points.

Some points are trained again with another seed and with a constant rate: the first ones, which
spread over the space and so over the ranking, and between them the best of the main design.
The order interleaves the tasks, so whatever is recorded when the time ends is of use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

RANKS = (4, 8, 16, 32, 64, 128)
TARGETS: dict[str, str | list[str]] = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all-linear": "all-linear",
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "q_v": ["q_proj", "v_proj"],
}
RATES = (1e-5, 1e-2)
DROPOUTS = (0.0, 0.05, 0.1)
LENGTHS = (128, 256, 512, 1024)
ALPHAS = ("rank", "2rank", "fixed16", "rslora8")
"""alpha = rank; 2 * rank; 16; and 8 with rsLoRA. At rank 16 the last is 2 * rank, the product's default."""
NUM_CONFIGS = 112  # of each task: points of the main design
REPEATED_CONFIGS = (0, 2, 4, 6, 8, 63, 1, 3, 70, 10, 23, 5, 12, 51, 7, 14, 9, 33, 11, 13, 52, 15, 77, 16, 17, 84, *range(18, 23))
"""Points of each task that have twins. The first 24 were chosen before anything was recorded; 63, 70,
51, 33, 52, 77 and 84 had the lowest losses of the tasks docs, code and requests at seed 0."""
NUM_EARLY_REPEATED, NUM_EARLY_CONFIGS = 21, 64
"""What comes first: twins of the early tasks, then so many points of the later tasks, then the rest."""
COORDINATES = Path(__file__).with_name("design_points.json")


@dataclass(frozen=True)
class Variant:
    """Name how a point is trained: its schedule and its seed."""

    lr_schedule: str
    seed: int


MAIN = Variant("cosine", 0)
REPEATED = (Variant("cosine", 1), Variant("constant", 0))


@dataclass(frozen=True)
class PlannedTrial:
    """Name one trial to record. group: trials of one group have the same shape and share recorded passes."""

    task: str
    config: int
    variant: Variant
    params: dict[str, Any]
    group: int

    @property
    def id(self) -> str:
        return f"{self.task}-{self.config:03d}-{self.variant.lr_schedule}-{self.variant.seed}"

    def sections(self) -> dict[str, dict[str, Any]]:
        """Return the sections `lora`, `optim`, `data` and `train` of the trial's config, as far as the design says."""
        params = self.params
        alpha, use_rslora = alpha_of(params["alpha"], params["lora.rank"])
        lora = {"rank": params["lora.rank"], "target_modules": TARGETS[params["lora.target_modules"]]}
        lora |= {"lora_alpha": alpha, "use_rslora": use_rslora, "lora_dropout": params["lora.lora_dropout"]}
        optim = {"learning_rate": params["optim.learning_rate"], "lr_schedule": self.variant.lr_schedule}
        return {
            "lora": lora, "optim": optim, "data": {"max_seq_length": params["data.max_seq_length"]},
            "train": {"seed": self.variant.seed},
        }  # fmt: skip


def alpha_of(convention: str, rank: int) -> tuple[float, bool]:
    """Return (lora_alpha, use_rslora) of a convention in ALPHAS."""
    alphas = {"rank": float(rank), "2rank": 2.0 * rank, "fixed16": 16.0, "rslora8": 8.0}
    return alphas[convention], convention == "rslora8"


def points(count: int = NUM_CONFIGS, lengths: Sequence[int] = LENGTHS) -> list[dict[str, Any]]:
    """Return the first `count` points: the same ones for all tasks, but for the lengths to choose from."""
    return [_point(row, lengths) for row in _coordinates()[:count]]


def planned(tasks: Mapping[str, Sequence[int]], later: Sequence[str] = ()) -> list[PlannedTrial]:
    """Return all trials in the order in which they are recorded.

    tasks: the lengths of each. later: tasks that come after all of the others.
    """
    early, late = [name for name in tasks if name not in later], [name for name in tasks if name in later]
    first, rest = REPEATED_CONFIGS[:NUM_EARLY_REPEATED], REPEATED_CONFIGS[NUM_EARLY_REPEATED:]
    every = range(NUM_CONFIGS)
    stages = (
        (early, (MAIN,), every), (early, REPEATED, first), (late, (MAIN,), every[:NUM_EARLY_CONFIGS]),
        (early, REPEATED, rest), (late, (MAIN,), every[NUM_EARLY_CONFIGS:]), (late, REPEATED, REPEATED_CONFIGS),
    )  # fmt: skip
    of_task = {name: points(lengths=tasks[name]) for name in tasks}
    groups = [(name, config, variants) for names, variants, configs in stages for config in configs for name in names]
    return [
        PlannedTrial(name, config, variant, of_task[name][config], group)
        for group, (name, config, variants) in enumerate(groups)
        for variant in variants
    ]


def shard(order: Sequence[PlannedTrial], index: int, count: int) -> list[PlannedTrial]:
    """Return the trials of process `index` of `count`; trials of one group stay together."""
    number = {group: place for place, group in enumerate(dict.fromkeys(trial.group for trial in order))}
    return [trial for trial in order if number[trial.group] % count == index]


def digest() -> str:
    """Return 12 hex digits of the main design."""
    return hashlib.sha256(json.dumps(points(), sort_keys=True).encode()).hexdigest()[:12]


@cache
def _coordinates() -> list[list[float]]:
    """Return rows of six coordinates in [0, 1): rank, targets, rate, alpha, dropout, length."""
    return json.loads(COORDINATES.read_text())


def _point(row: Sequence[float], lengths: Sequence[int]) -> dict[str, Any]:
    rank, targets, rate, alpha, dropout, length = row
    learning_rate = RATES[0] * (RATES[1] / RATES[0]) ** rate
    return {
        "lora.rank": _level(RANKS, rank),
        "lora.target_modules": _level(tuple(TARGETS), targets),
        "optim.learning_rate": float(f"{learning_rate:.3g}"),
        "alpha": _level(ALPHAS, alpha),
        "lora.lora_dropout": _level(DROPOUTS, dropout),
        "data.max_seq_length": _level(tuple(lengths), length),
    }


def _level(levels: Sequence[Any], coordinate: float) -> Any:
    return levels[min(len(levels) - 1, int(coordinate * len(levels)))]
