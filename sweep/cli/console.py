"""Show a sweep in the terminal: a live table of trials on a TTY, else one line per event.

A console listens to the ledger and decides nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from engine.trial_report import TrialReport
from engine.units import counted
from sweep.text import limits_text, metrics_text, params_text, printable_lines
from sweep.trials.record import GOING_ON, Outcome, TrialRecord
from sweep.trials.selection import Rule

COLORS = {
    Outcome.RUNNING: "cyan",
    Outcome.COMPLETE: "green",
    Outcome.STOPPED: "blue",
    Outcome.PAUSED: "magenta",
    Outcome.PRUNED: "yellow",
    Outcome.INFEASIBLE: "dim",
}
DEFAULT_RULE = Rule()
LOADING = "loading"
NUM_ENDED_SHOWN = 20  # a table longer than the screen cannot be redrawn in place


class LineConsole:
    """Print one line per event, for a pipe, a log file or a CI job."""

    def __init__(self, stream: TextIO, num_rungs: int) -> None:
        self._stream, self._num_rungs, self._time_left = stream, num_rungs, _no_time_left
        self._seen: dict[int, tuple[int, Outcome]] = {}

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def expect(self, time_left: Callable[[], str]) -> None:
        """Show in each line from now on how far the sweep is, and how long it still needs."""
        self._time_left = lambda: f"  | {time_left()}"

    def note(self, text: str) -> None:
        print(printable_lines(text), file=self._stream, flush=True)

    def on_trial_updated(self, record: TrialRecord) -> None:
        """Print a line if the trial has started, reported or ended since the last call."""
        state = (len(record.reports), record.outcome)
        before = self._seen.get(record.number)
        if before == state:
            return
        self._seen[record.number] = state
        if before is None and not record.reports and record.outcome is Outcome.RUNNING:
            self.note(f"trial {record.number:3d}  started   {params_text(record.params)}{record.warm_text}")
        elif record.reports and (before is None or before[0] != len(record.reports)):
            text = f"rung {_rung_text(record, self._num_rungs)}  {_report_text(record.reports[-1])}"
            self.note(f"trial {record.number:3d}  {text}{self._time_left()}")
        elif before is not None and record.outcome is Outcome.RUNNING:
            self.note(f"trial {record.number:3d}  goes on after rung {_rung_text(record, self._num_rungs)}")
        if record.outcome is not Outcome.RUNNING:
            self.note(f"trial {record.number:3d}  {_end_text(record)}{self._time_left()}")


class TableConsole:
    """Redraw one table in place, four times a second, for a terminal."""

    def __init__(
        self,
        stream: TextIO,
        num_rungs: int,
        num_trials: int,
        rule: Rule = DEFAULT_RULE,
        is_training: Callable[[TrialRecord], bool] = lambda record: True,
    ) -> None:
        """Show the trials. rule: which one is marked as the winner so far. is_training: has it loaded the model?"""
        self._is_training = is_training
        self._num_rungs, self._num_trials, self._started, self._rule = num_rungs, num_trials, time.monotonic(), rule
        self._records: dict[int, TrialRecord] = {}
        self._time_left = _no_time_left
        self._console = Console(file=stream)
        self._live = Live(
            console=self._console, get_renderable=self._table, refresh_per_second=4, redirect_stdout=False, redirect_stderr=False
        )

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        self._live.stop()

    def expect(self, time_left: Callable[[], str]) -> None:
        """Show over the table from now on how far the sweep is, and how long it still needs."""
        self._time_left = time_left

    def note(self, text: str) -> None:
        self._console.print(printable_lines(text), markup=False, highlight=False, soft_wrap=True)

    def on_trial_updated(self, record: TrialRecord) -> None:
        # the table shows only the best and the last report of an ended trial
        if record.outcome is not Outcome.RUNNING and record.reports:
            config = {"metrics": record.config.get("metrics")}
            record = replace(record, reports=[record.kept, record.reports[-1]], config=config)
        self._records[record.number] = record

    def _table(self) -> Table:
        records = list(self._records.values())
        resting = [record for record in records if record.outcome is not Outcome.RUNNING]
        num_ended = sum(record.outcome not in (*GOING_ON, Outcome.INFEASIBLE) for record in records)
        best = self._rule.best(records)
        seconds = int(time.monotonic() - self._started)
        refused = sum(record.outcome is Outcome.INFEASIBLE for record in resting)
        title = self._time_left() or f"{num_ended} of {counted(self._num_trials, 'trial')} ended"
        title = f"{seconds // 60}:{seconds % 60:02d}  {title}"
        title += f"; {refused} did not fit the card and were not started" if refused else ""
        table = Table(title=title, title_justify="left")
        for name, justify in (
            ("trial", "right"),
            ("params", "left"),
            ("rung", "right"),
            ("tokens", "right"),
            ("eval loss", "right"),
            *((name, "right") for name in self._metrics()),
            ("tok/s", "right"),
            ("outcome", "left"),
        ):
            table.add_column(name, justify=justify)
        hidden = {record.number for record in resting[:-NUM_ENDED_SHOWN] if record is not best}
        for record in records:
            if record.number not in hidden:
                table.add_row(*self._row(record, best))
        return table

    def _metrics(self) -> list[str]:
        """Return the evaluation sets and task metrics that some trial has, in their order."""
        return list(dict.fromkeys(name for record in self._records.values() for name in (*record.eval_losses, *record.metrics)))

    def _row(self, record: TrialRecord, best: TrialRecord | None) -> tuple[Text, ...]:
        """Return the cells as Text: a string would be read as markup, and params may hold brackets."""
        last = record.reports[-1] if record.reports else None
        score = "" if record.eval_loss is None else f"{record.eval_loss:.4f}"
        scores = {**record.eval_losses, **record.metrics}
        return (
            Text(str(record.number)),
            Text(f"{params_text(record.params)}{record.warm_text}"),
            Text(LOADING if self._is_loading(record) else _rung_text(record, self._num_rungs)),
            Text(f"{last.tokens_seen:,}" if last else ""),
            Text(score, style="bold green" if record is best else ""),
            *(Text(f"{scores[name]:.4f}" if name in scores else "") for name in self._metrics()),
            Text(f"{last.tokens_per_second:,.0f}" if last else ""),
            Text(str(record.outcome), style=COLORS.get(record.outcome, "red")),
        )


    def _is_loading(self, record: TrialRecord) -> bool:
        """Return whether the trial's process still loads libraries and model, or quantises it."""
        return record.outcome is Outcome.RUNNING and not record.reports and not self._is_training(record)


Screen = LineConsole | TableConsole


def make_console(
    stream: TextIO, num_rungs: int, num_trials: int, rule: Rule, is_training: Callable[[TrialRecord], bool]
) -> Screen:
    """Return a table console if the stream is a terminal, else a line console."""
    if not stream.isatty():
        return LineConsole(stream, num_rungs)
    return TableConsole(stream, num_rungs, num_trials, rule, is_training)


def _no_time_left() -> str:
    """Say nothing, as before a sweep's first trial."""
    return ""


def _rung_text(record: TrialRecord, num_rungs: int) -> str:
    return f"{record.reports[-1].rung if record.reports else 0}/{num_rungs}"


def _report_text(report: TrialReport) -> str:
    loss = f"eval loss {report.eval_loss:.4f}{metrics_text({**report.eval_losses, **report.metrics})}{limits_text(report)}"
    error = f"  WARNING: {report.metrics_error}" if report.metrics_error else ""
    return f"{report.tokens_seen:>9,} tokens  {loss}  {report.tokens_per_second:,.0f} tok/s{error}"


def _end_text(record: TrialRecord) -> str:
    tail = f"eval loss {record.eval_loss:.4f}{limits_text(record.kept)}{metrics_text(record.metrics)}" if record.reports else ""
    if record.outcome is Outcome.INFEASIBLE:  # it never started, so no line has shown its params
        tail = f"{params_text(record.params)}{record.warm_text}"
    return "  ".join(filter(None, [f"{record.outcome:<13}", tail, record.error]))


def warn(warnings: Iterable[str]) -> None:
    """Print warnings, which go to stderr."""
    for warning in warnings:
        print(f"WARNING: {warning}", file=sys.stderr, flush=True)
