"""Keep the answers of a trial at a rung, with their scores, in `answers/<rung>.jsonl` of its folder. No torch.

The first line names the samples; then each sample has a line. Two adapters compare answer by answer
if their samples are the same.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config.parsing import parse_dataclass
from engine.errors import InputError
from engine.sample_losses import SampleLosses
from engine.system.files import write_text

ANSWERS = "answers"


@dataclass(frozen=True)
class TaskAnswer:
    """Hold one sample with the answer to it.

    prompt, reference, answer: text; answer is empty if no metric generates. choice: the likeliest
    choice, None if there are none. scores: metric -> score.
    """

    prompt: str
    reference: str
    answer: str
    choice: str | None = None
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RungAnswers:
    """Hold all answers at one rung. samples_digest: 16 hex digits of prompts and references, in order."""

    rung: int
    samples_digest: str
    answers: tuple[TaskAnswer, ...]

    def costs(self, metric: str, sign: float) -> SampleLosses:
        """Return the scores of a metric in the form of losses, one for each sample, where smaller is better.

        sign: 1 if smaller scores are better, else -1.
        """
        scores = tuple(sign * answer.scores[metric] for answer in self.answers)
        return SampleLosses(self.samples_digest, scores, (1,) * len(scores))


def samples_digest(pairs: Sequence[tuple[str, str]]) -> str:
    """Return 16 hex digits of the prompts and references."""
    return hashlib.sha256(json.dumps(list(pairs)).encode()).hexdigest()[:16]


def write_answers(trial_folder: Path, found: RungAnswers) -> None:
    """Write the answers of a rung. The file is replaced as a whole or not at all."""
    lines: list[Mapping[str, Any]] = [{"rung": found.rung, "samples_digest": found.samples_digest}]
    lines += [{name: getattr(one, name) for name in TaskAnswer.__dataclass_fields__} for one in found.answers]
    folder = trial_folder / ANSWERS
    folder.mkdir(exist_ok=True)
    write_text(folder / _name(found.rung), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_answers(trial_folder: Path, rung: int) -> RungAnswers | None:
    """Return the answers of a rung, or None if there are none. Raises InputError if the file is damaged."""
    file = trial_folder / ANSWERS / _name(rung)
    if not file.is_file():
        return None
    try:
        head, *lines = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
        answers = tuple(parse_dataclass(TaskAnswer, line, "answers") for line in lines)
        found = RungAnswers(int(head["rung"]), str(head["samples_digest"]), answers)
        if found.rung == rung and answers and all(math.isfinite(s) for one in answers for s in one.scores.values()):
            return found
        fault = "it is another rung's, or has no answers"
    except (InputError, ValueError, TypeError, KeyError, RecursionError) as error:
        fault = f"it is not whole ({type(error).__name__})"
    raise InputError(str(file), ANSWERS, f"must hold the answers of rung {rung}, but {fault}; remove the file")


def _name(rung: int) -> str:
    return f"{rung:04d}.jsonl"
