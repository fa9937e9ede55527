"""Say in words what stands on the page of a sweep: facts under the title, and answers. No plotly."""

from __future__ import annotations

from collections import Counter

from engine.units import counted
from sweep.folder.sweep_folder import SweepFolder
from sweep.report.collect import Collected
from sweep.report.finalists_answers import finalists_answers
from sweep.report.page import Section, Table
from sweep.results.best_folder import EXAMPLE
from sweep.trials.record import Outcome, TrialRecord

EXAMPLE_HEADER = ("prompt", "expected", "base model", "with adapter")


def facts(found: Collected, with_data: bool = True) -> list[str]:
    """Return what stands under the title: model, trials so far, the verdict, and what became of the data."""
    folder, config = found.folder, found.config
    counts = Counter(record.outcome for record in found.records if record.source is None)
    ended = ", ".join(f"{counts[outcome]} {outcome}" for outcome in Outcome if counts[outcome])
    return [
        f"Model {config.model.path} ({config.model.quantization}), data {config.data.describe_train()}, folder {folder.path}.",
        f"{counted(sum(counts.values()), 'trial')} of {config.sweep.num_trials} asked for: {ended or 'none has started'}.",
        *found.verdict.lines,
        *_warm_line(found.records),
        *([f"Predicted for {card}."] if (card := folder.read_card()) else []),
        *(f"Data, {account.line()}." for account in folder.read_accounts() if with_data),
    ]


def _warm_line(records: list[TrialRecord]) -> list[str]:
    """Name the warm clones, and what their losses mean."""
    known = ", ".join(f"trial {record.number} {record.warm.text}" for record in records if record.warm)
    why = "Their losses count tokens that they did not see themselves, so neither search nor figures of parameters use them"
    return [f"Warm clones: {known}. {why}."] if known else []


def answer_sections(found: Collected) -> list[Section]:
    """Return what base model and winner answered, and the answers of the best trials if a task metric made some."""
    finalists = finalists_answers(found.rule, found.records, found.config.sweep.num_examples)
    return [_examples(found.folder, found.best), *finalists]


def _examples(folder: SweepFolder, best: TrialRecord | None) -> Section:
    """Show what base model and winner answered, if the sweep has ended."""
    title, found = "Examples before and after", folder.read_examples()
    if found is None or best is None or found["trial"] != best.number:
        return Section(title, "the end of a sweep generates them, unless sweep.num_examples is 0")
    if "error" in found:
        return Section(title, f"nothing could be generated: {found['error']}")
    rows = [[example[name] for name in EXAMPLE] for example in found["examples"]]
    caption = f"Evaluation samples, answered with the likeliest token at each step; the adapter is from trial {best.number}."
    return Section(title, Table(EXAMPLE_HEADER, rows, [""] * len(rows), is_text=True), caption)
