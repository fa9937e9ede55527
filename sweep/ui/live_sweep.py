"""Tell a page what has changed in a sweep since it last asked.

A cursor names a moment. The answer to it holds the trials that have changed since then, whole, and
the small parts of the page as they are. The driver does nothing for it: its files are read.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.errors import InputError
from sweep.folder.sweep_folder import SweepFolder
from sweep.report.chart_data import curves_by, metric_curve, usual_range
from sweep.report.collect import Collected, Collector
from sweep.report.page import Section
from sweep.report.page_text import answer_sections, facts
from sweep.results.leaderboard import board_rows, finite
from sweep.steering.checks import refusals
from sweep.steering.history import History
from sweep.trials.record import TrialRecord
from sweep.ui.drawn_figures import DrawnFigures
from sweep.ui.progress import Eta, progress, slots

LEAST_S = 0.5  # between two looks at the files, however many pages ask
LOG_BYTES = 32_768  # of the log's end
LEFT_OUT = ("rank", "folder")  # ranks change together, and a page needs no path


class LiveSweep:
    """Hold one sweep for its page. Any thread may ask."""

    def __init__(self, folder: SweepFolder, clock: Callable[[], float] = time.time) -> None:
        """clock: returns Unix seconds."""
        self.folder, self._clock = folder, clock
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._collector = Collector(self.folder)
        self._epoch, self._revision = secrets.token_hex(4), 0
        self._rows: dict[int, dict[str, Any]] = {}
        self._changed: dict[int, int] = {}
        self._ranks: list[int] = []
        self._looked_s, self._found, self._eta = float("-inf"), None, None
        self._figures = DrawnFigures()

    def changes(self, cursor: str | None) -> dict[str, Any]:
        """Return what has changed since the cursor; None or an unknown one: everything.

        A folder that cannot be read gives its `fault` in one line. cursor: that of an earlier answer.
        """
        with self._lock:
            try:
                found = self._look()
            except (InputError, OSError) as error:
                self._begin()  # the folder may be another one when it can be read again
                return {"fault": str(error), "cursor": ""}
            epoch, _, revision = (cursor or "").partition(".")
            since = int(revision) if epoch == self._epoch and revision.isdecimal() else -1
            return finite(self._answer(found, since))

    def figure(self, title: str, is_dark: bool, have: int | None = None) -> str | None:
        """Return one of FIGURES as JSON; see DrawnFigures.get. Raises InputError for a damaged folder."""
        with self._lock:
            found = self._look()
        return self._figures.get(found, title, is_dark, have)  # drawing takes longer than others should wait

    def _look(self) -> Collected:
        """Read what has changed in the folder, at most every LEAST_S."""
        now_s = time.monotonic()
        if self._found is None or now_s - self._looked_s >= LEAST_S:
            found = self._collector.collect()
            if found is not self._found:
                self._take(found)
            self._looked_s, self._found = now_s, found
        return self._found

    def _take(self, found: Collected) -> None:
        """Note which trials look otherwise than before."""
        self._revision += 1
        by_number = {record.number: record for record in found.records}
        rows = board_rows(found.records, found.rule)
        self._ranks = [row["number"] for row in rows]
        for row in rows:
            shown = _row(row, by_number[row["number"]], found.history)
            if self._rows.get(row["number"]) != shown:
                self._rows[row["number"]], self._changed[row["number"]] = shown, self._revision

    def _answer(self, found: Collected, since: int) -> dict[str, Any]:
        timeline, now_s, driven = self._collector.timeline, self._clock(), self.folder.is_driven()
        if self._eta is None or not self._eta.is_of(found, timeline):
            self._eta = Eta(found, timeline)
        left_s = self._eta.seconds(found, timeline, now_s) if driven else None
        answer = {
            "cursor": f"{self._epoch}.{self._revision}",
            "is_whole": since < 0,
            "progress": progress(found, timeline, driven, left_s, now_s),
            "slots": slots(found, timeline, driven),
            "log": _tail(self.folder.log),
        }
        if since < self._revision:
            new = [self._rows[number] for number in self._ranks if self._changed[number] > since]
            answers = [_shown_answers(section) for section in answer_sections(found)]
            answer |= {"trials": new, "ranks": self._ranks, "about": about(found), "answers": answers}
        return answer


def about(found: Collected) -> dict[str, Any]:
    """Return what a page says of the sweep as a whole."""
    metrics = {name for record in found.records for name in record.metrics}
    sets = {name for record in found.records for name in record.eval_losses}
    config, paths = found.config, [dimension.path for dimension in found.space.dimensions]
    values = {path: {str(record.params.get(path)) for record in found.records} for path in paths}
    return {
        "name": config.sweep.name,
        "facts": facts(found, with_data=False),
        "rule": found.rule.text,
        "chosen_by": found.rule.chosen_by,
        "sign": found.rule.sign,
        "metrics": sorted(metrics, key=lambda name: (name != found.rule.chosen_by, name)),
        "eval_sets": sorted(sets) if len(sets) > 1 else [],
        "shown_by": curves_by(found.records),
        "best": found.best and found.best.number,
        "front": [record.number for record in found.rule.front(found.records)],
        "objectives": list(config.sweep.objectives),
        "loss_range": usual_range([report.eval_loss for record in found.records for report in record.reports]),
        "num_rungs": len(config.train.report_grid()),
        # those that differ first; the order of the space else
        "params": sorted(paths, key=lambda path: len(values[path]) < 2),
        "evaluation": (found.folder.read_data() or {}).get("evaluation"),
        "data": [account.line() for account in found.folder.read_accounts()],
    }


def _row(row: dict[str, Any], record: TrialRecord, history: History) -> dict[str, Any]:
    last = record.reports[-1] if record.reports else None
    names = {name for report in record.reports for name in report.metrics}
    return {
        **{name: value for name, value in row.items() if name not in LEFT_OUT},
        "can_win": row["rank"] is not None,
        "rung": last.rung if last else 0,
        "train_loss": last and last.train_loss,
        "elapsed_s": last and last.elapsed_s,
        "started_s": record.started_s,
        "ended_s": record.ended_s,
        "curve": [[report.tokens_seen, report.eval_loss] for report in record.reports],
        **({"metric_curves": {name: metric_curve(record, name) for name in names}} if names else {}),
        "refused": refusals(record, history),
    }


def _shown_answers(section: Section) -> dict[str, Any]:
    """Return a section's table as plain data, or `none`: why there is nothing."""
    body = {"none": section.body} if isinstance(section.body, str) else {"header": section.body.header, "rows": section.body.rows}
    return {"title": section.title, "caption": section.caption, **body}


def _tail(file: Path) -> str:
    """Return the last whole lines of a log."""
    try:
        with open(file, "rb") as log:
            size = log.seek(0, 2)
            log.seek(max(size - LOG_BYTES, 0))
            text = log.read().decode(errors="replace")
    except OSError:
        return ""
    return text if size <= LOG_BYTES else text.partition("\n")[2]
