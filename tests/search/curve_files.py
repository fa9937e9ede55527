"""Keep recorded learning curves: lines while they are recorded, one compressed file a task at the end.

A line is `{"kind": "header" | "task" | "trial", ...}`. A process adds a header when it begins, a
task's facts before its first trial, and a line after each trial. `merge` puts the lines of many
processes together. Losses are mean nats per target token of the fixed evaluation samples.

In the file of a task, `trials` are in the order of `config`, then schedule and seed. `params` has
what a search would vary, by the product's names; `lora.target_modules` and `alpha` are names of
choices (tests/search/design.py). `config` numbers the point of the design, the same for its twins.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

FORMAT = 1
CURVES = Path(__file__).with_name("curves")
COMPLETE = "COMPLETE"


@dataclass(frozen=True)
class RecordedTrial:
    """Hold one recorded trial. A list has one entry a rung, and is shorter if the trial did not end as COMPLETE.

    tokens: tokens seen. loss: eval loss of the last adapter. average: that of the running average,
    None where there was none. elapsed_s: seconds in steps so far; processes shared the card, so the
    cost is `tokens`. sample_losses_e4: mean nats a target token of each evaluation sample, times
    10,000, for the adapter that was kept (lowest eval loss of all rungs and of both adapters), at
    `sample_rung`. seconds: of the whole trial. peak_reserved_gib: device memory.
    """

    id: str
    config: int
    lr_schedule: str
    seed: int
    params: dict[str, Any]
    lora_alpha: float
    use_rslora: bool
    outcome: str
    error: str | None
    tokens: list[int]
    loss: list[float]
    average: list[float] | None
    elapsed_s: list[float]
    sample_losses_e4: list[int] | None
    sample_losses_of: str | None
    sample_rung: int | None
    num_trainable: int | None
    peak_reserved_gib: float | None
    seconds: float


@dataclass(frozen=True)
class Curves:
    """Hold the recorded trials of a task. task: what it is, budget and digests; recorded: card, versions, commit."""

    task: dict[str, Any]
    recorded: list[dict[str, Any]]
    trials: list[RecordedTrial]

    def main(self) -> list[RecordedTrial]:
        """Return the trials of the main design: cosine, seed 0, one for each point."""
        return self.of("cosine", 0)

    def of(self, lr_schedule: str, seed: int) -> list[RecordedTrial]:
        """Return the trials of one schedule and one seed."""
        return [trial for trial in self.trials if (trial.lr_schedule, trial.seed) == (lr_schedule, seed)]


def read_curves(file: Path) -> Curves:
    """Read the file of a task. ValueError if it has another format."""
    found = json.loads(gzip.decompress(file.read_bytes()))
    if found["format"] != FORMAT:
        raise ValueError(f"{file}: format {found['format']}, expected {FORMAT}")
    return Curves(found["task"], found["recorded"], [RecordedTrial(**trial) for trial in found["trials"]])


def write_curves(file: Path, curves: Curves) -> None:
    """Write the file of a task; the same curves always give the same bytes."""
    values = {"format": FORMAT, "task": curves.task, "recorded": curves.recorded, "trials": [vars(t) for t in curves.trials]}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(json.dumps(values, separators=(",", ":")).encode(), mtime=0))


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read the lines that a process recorded, without a torn last one, or those that a task's file was made of."""
    if file.suffix == ".gz":
        return _lines_of(read_curves(file))
    lines = file.read_bytes().split(b"\n") if file.is_file() else [b""]
    return [json.loads(line) for line in lines[:-1] if line]


def _lines_of(curves: Curves) -> list[dict[str, Any]]:
    """Return the lines that `merge` makes these curves of."""
    facts = {key: value for key, value in curves.task.items() if key != "sample_targets"}
    headers = [{"kind": "header", **one} for one in curves.recorded]
    common = {"kind": "trial", "task": facts["name"], "sample_targets": curves.task["sample_targets"]}
    return [*headers, {"kind": "task", **facts}, *({**common, **vars(trial)} for trial in curves.trials)]


def cut_torn_line(file: Path) -> None:
    """Remove a last line without an end, which a killed process left, so that lines can be added."""
    if file.is_file():
        content = file.read_bytes()
        if not content.endswith(b"\n"):
            file.write_bytes(content[: content.rfind(b"\n") + 1])


def merge(files: Iterable[Path]) -> dict[str, Curves]:
    """Put the lines of these files together: the curves of each task.

    A trial that was recorded twice counts once, and COMPLETE goes before any other outcome.
    ValueError if the files disagree about a task's samples or budget.
    """
    lines = [line for file in files for line in read_lines(file)]
    recorded = _distinct({k: v for k, v in line.items() if k != "kind"} for line in lines if line["kind"] == "header")
    merged = {}
    for name in dict.fromkeys(line["task"] for line in lines if line["kind"] == "trial"):
        facts = _distinct({k: v for k, v in line.items() if k != "kind"} for line in lines if _is_of("task", line, name))
        measured = {key: {json.dumps(fact[key]) for fact in facts} for key in facts[0] if key != "base_eval_loss"}
        if differing := [key for key, values in measured.items() if len(values) > 1]:
            raise ValueError(f"{name}: the files differ in {', '.join(differing)}")
        targets = _distinct({"sample_targets": line["sample_targets"]} for line in lines if _is_of("trial", line, name))
        targets = [found for found in targets if found["sample_targets"] is not None]
        if len(targets) > 1:
            raise ValueError(f"{name}: the files differ in sample_targets")
        trials: dict[str, RecordedTrial] = {}
        for line in lines:
            if _is_of("trial", line, name):
                trial = RecordedTrial(**{field.name: line[field.name] for field in fields(RecordedTrial)})
                if trial.id not in trials or (trial.outcome == COMPLETE != trials[trial.id].outcome):
                    trials[trial.id] = trial
        ordered = sorted(trials.values(), key=lambda trial: (trial.config, trial.lr_schedule != "cosine", trial.seed))
        merged[name] = Curves({**facts[0], **(targets[0] if targets else {"sample_targets": None})}, recorded, ordered)
    return merged


def _is_of(kind: str, line: dict[str, Any], task: str) -> bool:
    return line["kind"] == kind and line["name" if kind == "task" else "task"] == task


def _distinct(values: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({json.dumps(value, sort_keys=True): value for value in _present(values)}.values())


def _present(values: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Leave out what says when and where a process ran, which differs between equal ones."""
    for value in values:
        yield {key: entry for key, entry in value.items() if key != "shard"}
