"""Build `report.html`, a sweep on one page, from the sweep's folder.

`python -m sweep.report <sweep folder>` writes it again, even if the sweep was stopped or killed or
is still running. It reads the journal, reports and timeline, and changes none of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from engine.errors import first_line
from engine.system.files import write_text
from sweep.folder.slot_times import SlotTime
from sweep.folder.sweep_folder import SweepFolder
from sweep.folder.timeline import Span
from sweep.report import figures as report_figures
from sweep.report.chart_data import CURVES, HOURS, MEMORY, PARETO, SLOTS, curves_by
from sweep.report.collect import Collected, Collector, damaged
from sweep.report.figures import Drawn
from sweep.report.hours_figure import hours_height, hours_line, where_hours_went
from sweep.report.page import Section, Table, render
from sweep.report.page_text import answer_sections, facts
from sweep.report.study_figures import ON_WHITE, Scale, study_figures
from sweep.results.leaderboard import board_rows, board_table, equal_line
from sweep.study.journal import DAMAGED
from sweep.trials.objectives import EVAL_LOSS
from sweep.trials.record import CONTENDERS, Outcome, TrialRecord
from sweep.trials.selection import Rule

LOSSES = "Eval loss by tokens seen"
CURVES_CAPTION = (
    "On one evaluation set, against the tokens a trial has trained on. Pruned trials are faded; a click on a name hides "
    "its lines. Losses far above the usual range are cut off; a double click shows all."
)
PARETO_CAPTION = (
    "Stars: COMPLETE trials that no other trial beats in all three. A trial that was stopped early has spent less only "
    "because it was stopped."
)


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
    measure = curves_by(records)
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


def _of_study(title: str, make: Callable[[], Drawn]) -> Section:
    return Section(title, make(), height=500, is_broad=True)


def _hours(times: list[SlotTime]) -> Section:
    return Section(HOURS, where_hours_went(times), hours_line(times), hours_height(times))


def _slots(records: list[TrialRecord], spans: list[Span]) -> Section:
    height = 160 + 46 * len({span.slot for span in spans})
    return Section(SLOTS, report_figures.slots(records, spans), report_figures.dead_time_line(spans), height, is_broad=True)


def _leaderboard(records: list[TrialRecord], rule: Rule) -> Section:
    title, caption = "Leaderboard", f"Rule: {rule.text}."
    if not records:
        return Section(title, "no trial has started", caption)
    rows = board_rows(records, rule)
    header, cells = board_table(rows, rule)
    first = rule.best(records)
    kinds = ["first" if first is not None and row["number"] == first.number else _kind(row["outcome"]) for row in rows]
    return Section(title, Table(header, cells, kinds), " ".join(filter(None, [caption, equal_line(rows)])))


def _kind(outcome: str) -> str:
    return "" if outcome in (*CONTENDERS, Outcome.RUNNING) else "faded"
