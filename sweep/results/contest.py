"""Compare the contenders on the same evaluation samples, from the losses in their folders."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from engine.config.metrics_section import EVAL_LOSS, PREFERENCE_ACCURACY
from engine.errors import InputError
from engine.sample_losses import SampleLosses, read_sample_losses
from engine.scoring.answers_file import read_answers
from engine.units import counted
from sweep.trials.paired import LEVEL_TEXT, Contest, hold_contest
from sweep.trials.record import TrialRecord
from sweep.trials.selection import Rule, lowest

NAMED = 12  # trials in a line; more are counted
LOWEST = "the lowest loss"
NONE, DAMAGED = "no losses by sample", "damaged losses by sample"


def with_contest(rule: Rule, records: list[TrialRecord]) -> Rule:
    """Return the rule with the contest that these records make; without one if fewer than two may win.

    A trial without usable losses by sample takes no part, and the rule treats it as it did before
    there were such losses. The same files give the same contest, on a resume too.
    """
    able = rule.contenders(records)
    if len(able) < 2:
        return replace(rule, contest=None)
    first, losses, left_out = lowest(able).number, {}, {}
    for record in able:
        found = _read(record)
        (left_out if isinstance(found, str) else losses)[record.number] = found
    if first not in losses:
        return replace(rule, contest=Contest(first, left_out=left_out))
    return replace(rule, contest=hold_contest(losses, first, left_out))


def _read(record: TrialRecord) -> SampleLosses | str:
    """Return the losses by sample of the adapter in the trial's folder, or what is wrong with them.

    If a metric decides, they are its scores of the answers, turned so that smaller is better.
    """
    kept, name = record.kept, record.chosen_by
    try:
        if name in (EVAL_LOSS, PREFERENCE_ACCURACY):
            found = read_sample_losses(Path(record.folder), kept)
            found = found.accuracy_costs() if found and name == PREFERENCE_ACCURACY else found
        else:
            answers = read_answers(Path(record.folder), kept.rung)
            found = answers and answers.costs(name, record.sign)
            if found and not math.isclose(found.mean, record.score, rel_tol=1e-9, abs_tol=1e-12):
                return DAMAGED
    except (InputError, OSError, KeyError):
        return DAMAGED
    return NONE if found is None else found


def contest_text(contest: Contest | None, best: int, measure: str = LOWEST) -> str | None:
    """Say in a line who cannot be told apart from the lowest loss; None if nothing was to compare.

    best: the trial that the rule chose. measure: what the first of them has.
    """
    if contest is None:
        return None
    first, is_loss = contest.lowest, measure == LOWEST
    mean, place = ("mean loss", "lowest") if is_loss else ("mean score", "best")
    if first in contest.left_out:
        return f"Trials are compared by their {mean} alone: trial {first}, the {place}, has {contest.left_out[first]}."
    parts = []
    if contest.differences:
        tied, others = contest.tied, counted(len(contest.differences), "other trial")
        what = f"{_trials(tied)} cannot be told apart from" if tied else "every other trial is told apart from"
        chosen = f"; of these, the rule chose trial {best}" if best in tied else ""
        samples = counted(contest.num_samples, "evaluation sample")
        parts.append(f"On the same {samples}, {what} trial {first}, {measure} ({LEVEL_TEXT}, {others} compared){chosen}.")
    for reason in sorted(set(contest.left_out.values())):
        numbers = [number for number, why in contest.left_out.items() if why == reason]
        parts.append(f"Compared by {mean} alone: {_trials(sorted(numbers))} ({reason}).")
    return " ".join(parts) or None


def _trials(numbers: Iterable[int]) -> str:
    """Return `trial 3`, `trials 3 and 7`, or `trials 1, 2, ... and 30 more`."""
    texts = [str(number) for number in numbers]
    if len(texts) > NAMED:
        texts = [*texts[:NAMED], f"{len(texts) - NAMED} more"]
    if len(texts) == 1:
        return f"trial {texts[0]}"
    return f"trials {', '.join(texts[:-1])} and {texts[-1]}"
