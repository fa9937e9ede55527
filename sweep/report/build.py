"""Build `report.html`, a sweep on one page, from the sweep's folder.

`python -m sweep.report <sweep folder>` writes it again, even if the sweep was stopped or killed or
is still running. It reads the journal, reports and timeline, and changes none of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from engine.errors import first_line
from engine.system.files import write_text
from engine.units import counted
from sweep.folder.slot_times import SlotTime
from sweep.folder.sweep_folder import SweepFolder
from sweep.folder.timeline import Span
from sweep.report import figures as report_figures
from sweep.report.collect import Collected, Collector, damaged
from sweep.report.figures import Drawn
from sweep.report.finalists_answers import finalists_answers
from sweep.report.hours_figure import HOURS, hours_height, hours_line, where_hours_went
from sweep.report.page import Section, Table, render
from sweep.report.study_figures import ON_WHITE, Scale, study_figures
from sweep.results.best_folder import EXAMPLE
from sweep.results.leaderboard import board_rows, board_table, equal_line
from sweep.study.journal import DAMAGED
from sweep.trials.objectives import EVAL_LOSS
from sweep.trials.record import CONTENDERS, Outcome, TrialRecord
from sweep.trials.selection import Rule

LOSSES = "Eval loss by tokens seen"
CURVES, PARETO, MEMORY, SLOTS = "Learning curves", "Loss, memory and time", "Predicted and measured memory", "Slots"
CURVES_CAPTION = (
    "On one evaluation set, against the tokens a trial has trained on. Pruned trials are faded; a click on a name hides "
    "its lines. Losses far above the usual range are cut off; a double click shows all."
)
PARETO_CAPTION = (
    "Stars: COMPLETE trials that no other trial beats in all three. A trial that was stopped early has spent less only "
    "because it was stopped."
)
EXAMPLE_HEADER = ("prompt", "expected", "base model", "with adapter")


def try_write_report(folder: SweepFolder, note: Callable[[str], None]) -> None:
    """Write the report at the end of a sweep; an error becomes one line and does not fail it."""
    try:
        note(f"report       {write_report(folder)}")
    except Exception as error:
        again = f"python -m sweep.report {folder.path}"
        note(f"WARNING: report.html was not written ({type(error).__name__}: {first_line(error)}); to try again: {again}")


def write_report(folder: SweepFolder) -> Path:
    """Write report.html, replacing an older one in one rename; return the file.

    InputError if the folder cannot be read.
    """
    found = Collector(folder).collect()
    try:
        page = _page(found)
    except DAMAGED as error:
        raise damaged(folder, error) from error
    file = folder.path / "report.html"
    write_text(file, page)
    return file


def _page(found: Collected) -> str:
    config = found.config
    sections = [
        _leaderboard(found.records, found.rule),
        *(make() for make in figure_sections(found).values()),
        *answer_sections(found),
    ]
    tracking = config.tracking.model_copy(update={"uri": config.tracking.public_uri})
    shown = config.model_copy(update={"tracking": tracking}).model_dump(mode="json")
    return render(f"Sweep {config.sweep.name}", facts(found), sections, json.dumps(shown, indent=2))


def figure_sections(found: Collected, scale: Scale = ON_WHITE) -> dict[str, Callable[[], Section]]:
    """Return what draws each figure of the sweep, by title. scale: the colours of losses, low to high."""
    records, study = found.records, study_figures(found.trials, found.records, found.space, scale)
    measure = report_figures.curves_by(records)
    losses = {LOSSES: lambda: Section(LOSSES, report_figures.learning_curves(records, found.best))}
    return {
        CURVES: lambda: Section(CURVES, report_figures.learning_curves(records, found.best, measure), CURVES_CAPTION),
        **(losses if measure != EVAL_LOSS else {}),
        **{title: partial(_of_study, title, make) for title, make in study.items()},
        PARETO: lambda: Section(PARETO, report_figures.pareto(records), PARETO_CAPTION, is_broad=True),
        MEMORY: lambda: Section(MEMORY, report_figures.memory(records)),
        HOURS: lambda: _hours(found.slot_times),
        SLOTS: lambda: _slots(records, found.timeline.spans),
    }


def answer_sections(found: Collected) -> list[Section]:
    """Return what base model and winner answered, and the answers of the best trials if a task metric made some."""
    finalists = finalists_answers(found.rule, found.records, found.config.sweep.num_examples)
    return [_examples(found.folder, found.best), *finalists]


def _of_study(title: str, make: Callable[[], Drawn]) -> Section:
    return Section(title, make(), height=500, is_broad=True)


def _hours(times: list[SlotTime]) -> Section:
    return Section(HOURS, where_hours_went(times), hours_line(times), hours_height(times))


def _slots(records: list[TrialRecord], spans: list[Span]) -> Section:
    height = 160 + 46 * len({span.slot for span in spans})
    return Section(SLOTS, report_figures.slots(records, spans), report_figures.dead_time_line(spans), height, is_broad=True)


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


def _leaderboard(records: list[TrialRecord], rule: Rule) -> Section:
    title, caption = "Leaderboard", f"Rule: {rule.text}."
    if not records:
        return Section(title, "no trial has started", caption)
    rows = board_rows(records, rule)
    header, cells = board_table(rows, rule)
    first = rule.best(records)
    kinds = ["first" if first is not None and row["number"] == first.number else _kind(row["outcome"]) for row in rows]
    return Section(title, Table(header, cells, kinds), " ".join(filter(None, [caption, equal_line(rows)])))


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


def _kind(outcome: str) -> str:
    return "" if outcome in (*CONTENDERS, Outcome.RUNNING) else "faded"
