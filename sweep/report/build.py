"""Build `report.html`, a sweep on one page, from the sweep's folder.

`python -m sweep.report <sweep folder>` writes it again, even if the sweep was stopped or killed or
is still running. It reads the journal, reports and timeline, and changes none of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.errors import InputError, first_line
from engine.system.files import write_text
from engine.units import counted
from sweep.config.sweep import SweepConfig
from sweep.folder.slot_times import slot_times
from sweep.folder.sweep_folder import SweepFolder
from sweep.folder.timeline import Timeline
from sweep.report import figures as report_figures
from sweep.report.finalists_answers import finalists_answers
from sweep.report.hours_figure import HOURS, hours_height, hours_line, where_hours_went
from sweep.report.page import Section, Table, render
from sweep.report.study_figures import study_figures
from sweep.results.best_folder import EXAMPLE
from sweep.results.contest import with_contest
from sweep.results.leaderboard import board_rows, board_table
from sweep.results.verdict import SweepVerdict, read_verdict
from sweep.space.parse import parse_space
from sweep.study.begun_with import read_unedited_config
from sweep.study.journal import read_records
from sweep.trials.record import CONTENDERS, Outcome, TrialRecord
from sweep.trials.selection import Rule

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
    config = read_unedited_config(folder)
    try:
        page = _page(folder, config)
    except InputError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise InputError("folder", str(folder.path), f"has a damaged journal or timeline ({first_line(error)})") from error
    file = folder.path / "report.html"
    write_text(file, page)
    return file


def _page(folder: SweepFolder, config: SweepConfig) -> str:
    space, base = parse_space(config.space), config.base().model_dump(mode="json")
    trials, records = read_records(folder, lambda params: space.apply(base, params).model_dump(mode="json"))
    timeline = Timeline(folder.timeline, mend=False)
    spans, times = timeline.spans, slot_times(timeline)
    rule = with_contest(config.rule, records)
    verdict = read_verdict(folder, records, rule)
    best = verdict.best
    sections = [
        Section("Leaderboard", _leaderboard(records, rule), f"Rule: {rule.text}."),
        Section(
            "Learning curves",
            report_figures.learning_curves(records, best),
            "On one evaluation set, against the tokens a trial has trained on. Pruned trials are faded; a click on a name hides "
            "its lines. Losses far above the usual range are cut off; a double click shows all.",
        ),
        *(Section(title, figure, height=500) for title, figure in study_figures(trials, records, space).items()),
        Section(
            "Loss, memory and time",
            report_figures.pareto(records),
            "Stars: COMPLETE trials that no other trial beats in all three. A trial that was stopped early has spent less only "
            "because it was stopped.",
        ),
        Section("Predicted and measured memory", report_figures.memory(records)),
        Section(HOURS, where_hours_went(times), hours_line(times), hours_height(times)),
        Section("Slots", report_figures.slots(records, spans), report_figures.dead_time_line(spans), _slots_height(spans)),
        _examples(folder, best),
        *finalists_answers(rule, records, config.sweep.num_examples),
    ]
    tracking = config.tracking.model_copy(update={"uri": config.tracking.public_uri})
    shown = config.model_copy(update={"tracking": tracking}).model_dump(mode="json")
    return render(f"Sweep {config.sweep.name}", _facts(folder, config, records, verdict), sections, json.dumps(shown, indent=2))


def _facts(folder: SweepFolder, config: SweepConfig, records: list[TrialRecord], verdict: SweepVerdict) -> list[str]:
    counts = Counter(record.outcome for record in records if record.source is None)
    ended = ", ".join(f"{counts[outcome]} {outcome}" for outcome in Outcome if counts[outcome])
    return [
        f"Model {config.model.path} ({config.model.quantization}), data {config.data.describe_train()}, folder {folder.path}.",
        f"{counted(sum(counts.values()), 'trial')} of {config.sweep.num_trials} asked for: {ended or 'none has started'}.",
        *(f"Data, {account.line()}." for account in folder.read_accounts()),
        *([f"Predicted for {card}."] if (card := folder.read_card()) else []),
        *verdict.lines,
    ]


def _leaderboard(records: list[TrialRecord], rule: Rule) -> Table | str:
    if not records:
        return "no trial has started"
    rows = board_rows(records, rule)
    header, cells = board_table(rows)
    first = rule.best(records)
    kinds = ["first" if first is not None and row["number"] == first.number else _kind(row["outcome"]) for row in rows]
    return Table(header, cells, kinds)


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


def _slots_height(spans: list[Any]) -> int:
    return 160 + 46 * len({span.slot for span in spans})
