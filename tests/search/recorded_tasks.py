"""Make tasks for replays from files of recorded curves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .curve_files import read_curves
from .design import TARGETS
from .points import Point, Task

CURVE_FILES = "*.json.gz"
ADAPTERS = ("last", "average", "kept")
ALPHA = "lora.lora_alpha"
# a stand-in for each convention of alpha, which no single field of a trial's config can name
CONVENTIONS = {"rank": 1.0, "2rank": 2.0, "rslora8": 8.0, "fixed16": 16.0}
NAMES = {"lora.target_modules": TARGETS, ALPHA: CONVENTIONS}


def read_tasks(folder: Path, schedule: str = "cosine", adapter: str = "last") -> list[Task]:
    """Return a task for each file in the folder, by name. Raises ValueError if there is none."""
    files = sorted(folder.glob(CURVE_FILES))
    if not files:
        raise ValueError(f"{folder}: no {CURVE_FILES}")
    return [make_task(content_of(file), schedule, adapter) for file in files]


def content_of(file: Path) -> dict[str, Any]:
    """Return a curve file's content as plain data."""
    curves = read_curves(file)
    return {"task": curves.task, "trials": [vars(trial) for trial in curves.trials]}


def make_task(content: Mapping[str, Any], schedule: str = "cosine", adapter: str = "last") -> Task:
    """Return the task of one file's content.

    schedule: of the trials to take. adapter: which losses count: those of the last adapter, of the
    average, or of the lower of both at each rung.
    """
    about, by_config = content["task"], defaultdict(list)
    for trial in content["trials"]:
        if trial["lr_schedule"] == schedule and trial["outcome"] in ("COMPLETE", "DIVERGED"):
            by_config[trial["config"]].append(trial)
    num_rungs, tokens = about["num_rungs"], about["max_tokens"]
    return Task(
        about["name"],
        tuple(tokens * rung // num_rungs for rung in range(1, num_rungs + 1)),
        tuple(_point(sorted(trials, key=lambda trial: trial["seed"]), adapter) for _, trials in sorted(by_config.items())),
        NAMES,
    )


def _point(trials: list[Mapping[str, Any]], adapter: str) -> Point:
    params = {ALPHA if path == "alpha" else path: value for path, value in trials[0]["params"].items()}
    num_trainable = max(trial["num_trainable"] or 0 for trial in trials)
    settings = {"lora": {name: trials[0][name] for name in ("lora_alpha", "use_rslora")}}
    return Point(params, tuple(tuple(losses_of(trial, adapter)) for trial in trials), num_trainable, settings)


def losses_of(trial: Mapping[str, Any], adapter: str) -> list[float]:
    """Return the losses by rung of the last adapter, of the average, or the lower of both (kept)."""
    last, average = trial["loss"], trial["average"] or trial["loss"]
    return {"last": last, "average": average, "kept": [min(pair) for pair in zip(last, average)]}[adapter]
