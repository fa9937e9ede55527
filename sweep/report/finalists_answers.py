"""Show the answers of the best trials side by side, those first in which they differ."""

from __future__ import annotations

from pathlib import Path

from engine.errors import InputError
from engine.scoring.answers_file import RungAnswers, TaskAnswer, read_answers
from sweep.report.page import Section, Table
from sweep.trials.record import TrialRecord
from sweep.trials.selection import Rule

NUM_FINALISTS = 3
TITLE = "Answers of the best trials"


def finalists_answers(rule: Rule, records: list[TrialRecord], num_shown: int) -> list[Section]:
    """Return the section; nothing if no trial measured a task metric, or nothing is to be shown.

    num_shown: samples in the table. A trial takes part if it answered the same samples as the best.
    """
    able = {record.number for record in rule.contenders(records)}
    ranked = [record for record in rule.rank(records) if record.number in able and record.metrics]
    if not ranked or not num_shown:
        return []
    found: list[tuple[TrialRecord, RungAnswers]] = []
    for record in ranked[:NUM_FINALISTS]:
        answers = _read(record)
        if answers is not None and (not found or answers.samples_digest == found[0][1].samples_digest):
            found.append((record, answers))
    if not found:
        return [Section(TITLE, "the files with the answers are missing or damaged")]
    samples = list(zip(*(answers.answers for _, answers in found), strict=True))
    order = sorted(range(len(samples)), key=lambda i: (_spread(samples[i]) == 0.0, i))[:num_shown]
    rows = [[samples[i][0].prompt, samples[i][0].reference, *map(_text, samples[i])] for i in order]
    header = ("prompt", "expected", *(f"trial {record.number}" for record, _ in found))
    differing = sum(_spread(one) > 0.0 for one in samples)
    caption = f"{len(order)} of {len(samples)} evaluation samples; the trials score differently on {differing}, which come first."
    return [Section(TITLE, Table(header, rows, [""] * len(rows), is_text=True), caption)]


def _read(record: TrialRecord) -> RungAnswers | None:
    try:
        return read_answers(Path(record.folder), record.kept.rung)
    except (InputError, OSError):
        return None


def _spread(answers: tuple[TaskAnswer, ...]) -> float:
    """Return the largest difference of a score between the trials."""
    names = set.intersection(*(set(one.scores) for one in answers))
    return max((max(a.scores[n] for a in answers) - min(a.scores[n] for a in answers) for n in names), default=0.0)


def _text(answer: TaskAnswer) -> str:
    said = answer.answer if answer.choice is None else f"{answer.answer}\nchoice: {answer.choice}".lstrip("\n")
    return "\n".join([said, *(f"[{name} {score:g}]" for name, score in answer.scores.items())])
