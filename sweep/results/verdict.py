"""State what a sweep has come to: its winner, the second measurement, a better earlier trial.

Terminal, leaderboard, report, model card and MLflow tell it from this record alone, so that they
cannot differ.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.parsing import load_json
from engine.errors import InputError, printable
from engine.units import perplexity
from sweep.folder.sweep_folder import SweepFolder
from sweep.results.contest import LOWEST, contest_text
from sweep.results.final_seeds import SeedLosses, pooled_deviation, read_final_seeds, seeds_text
from sweep.results.reevaluation import Reevaluation
from sweep.text import metrics_text, number, value_text
from sweep.trials.objectives import EVAL_LOSS
from sweep.trials.record import CONTENDERS, Outcome, TrialRecord
from sweep.trials.selection import Rule

LINES = ("best", "measured", "gain", "contest", "seeds", "held", "earlier")
NONE = "No trial has gone far enough to be chosen."


@dataclass(frozen=True)
class SweepVerdict:
    """Hold what is true of a sweep's trials under its rule.

    best: the winner, or None. reevaluation: the second measurement of exactly this winner, None
    until there is one. held: the trial whose adapter `best/` holds, None if there is no `best/`.
    earlier: the COMPLETE trial of an earlier sweep that did better than the winner, or than nothing.
    final_seeds: losses of the best trials with other seeds. nearest: without a winner, the trial that is least above
    data.eval_limits.
    """

    rule: Rule
    best: TrialRecord | None
    reevaluation: Reevaluation | None = None
    held: int | None = None
    earlier: TrialRecord | None = None
    final_seeds: tuple[SeedLosses, ...] = ()
    nearest: TrialRecord | None = None

    @property
    def best_line(self) -> str:
        if self.best is None and self.nearest is not None:
            excess = f"trial {self.nearest.number} comes nearest, {number(self.nearest.excess, '.4f')} nats above them"
            return f"No trial keeps to data.eval_limits, so none is chosen: {excess}."
        if self.best is None:
            return NONE
        params = ", ".join(f"{path} = {value_text(value)}" for path, value in self.best.params.items())
        loss = f"eval loss {number(self.best.eval_loss, '.4f')}"
        loss += "" if self.best.is_of_pairs else f" (perplexity {perplexity(self.best.eval_loss):.3f})"
        loss += metrics_text({**self.best.eval_losses, **self.best.metrics})
        so_far = "" if self.reevaluation else " so far"
        return printable(f"Best{so_far}: trial {self.best.number}, {loss}, {params or 'nothing varied'}{self.best.warm_text}.")

    @property
    def measured_line(self) -> str | None:
        """Say what the winner's files came to when measured again; None before that."""
        again = self.reevaluation
        if self.best is None or again is None:
            return None
        agrees = "agrees" if again.agrees else "does NOT agree"
        return (
            f"Evaluated again after the sweep: base model {number(again.base_eval_loss, '.4f')}, adapter of trial "
            f"{self.best.number} {number(again.eval_loss, '.4f')} {self.best.loss_unit} ({agrees} with the trial's own report)"
            f"{again.metrics_text}."
        )

    @property
    def gain_line(self) -> str | None:
        """Say what the adapter gains over the base model, with its interval; None if not known."""
        gain = self.reevaluation and self.reevaluation.gain
        return f"Gain over the base model: {gain.text}." if gain else None

    @property
    def contest_line(self) -> str | None:
        """Say which trials cannot be told apart from the lowest loss; None if there are no others."""
        if self.best is None:
            return None
        measure = LOWEST if self.rule.chosen_by == EVAL_LOSS else self.rule.best_text
        return contest_text(self.rule.contest, self.best.number, measure)

    @property
    def seeds_line(self) -> str | None:
        """Say what another seed changes; None if nothing was trained again."""
        return seeds_text(self.final_seeds)

    @property
    def held_line(self) -> str | None:
        """Say what `best/` holds where that is not the winner as it was measured; else None."""
        if self.held is None or self.reevaluation is not None:
            return None
        if self.best is None:
            return f"best/ holds the adapter of trial {self.held}, which was chosen before and cannot win now."
        if self.held == self.best.number:
            return f"best/ holds an older adapter of trial {self.held}; the end of the sweep replaces it."
        return f"best/ still holds the adapter of trial {self.held}, the best before; the end of the sweep replaces it."

    @property
    def earlier_line(self) -> str | None:
        """Name the earlier trial that did better, and where its adapter is; None if none did."""
        if self.earlier is None:
            return None
        loss = f"eval loss {number(self.earlier.eval_loss, '.4f')}{metrics_text(self.earlier.metrics)}, {self.earlier.source}"
        return printable(f"An earlier trial did better: {loss}; its adapter is {earlier_adapter(self.earlier)}.")

    @property
    def lines(self) -> list[str]:
        """Return all that can be said, for a page: winner, measurement, what differs from it."""
        return list(filter(None, (getattr(self, f"{name}_line") for name in LINES)))

    def summary(self) -> dict[str, Any]:
        """Return what the tracker gets. Every key is there each time, so no former value stays."""
        again, best = self.reevaluation, self.best
        numbers = {"best_eval_loss": again.eval_loss if again else best and best.eval_loss}
        numbers |= {f"metric_{name}": value for name, value in ((best and best.metrics) or {}).items()}
        numbers |= {f"set_{name}": value for name, value in ((best and best.eval_losses) or {}).items()}
        if again is not None:
            numbers |= {f"set_{name}": value for name, value in again.eval_losses.items()}
            numbers |= {f"base_set_{name}": value for name, value in again.base_eval_losses.items()}
            numbers |= {f"metric_{name}": value for name, value in again.metrics.items()}
            numbers |= {f"base_metric_{name}": value for name, value in again.base_metrics.items()}
        numbers |= {"base_eval_loss": again and again.base_eval_loss, **self._contest_numbers()}
        return {name: value for name, value in numbers.items() if value is not None} | {
            "best_trial": "none" if best is None else str(best.number),
            "tied_with_lowest": self._tied_text(),
            "reevaluation_agrees": str(again.agrees) if again else "not measured",
            "better_earlier_trial": "none" if self.earlier is None else str(self.earlier.source),
        }

    def _contest_numbers(self) -> dict[str, float | None]:
        gain, contest = self.reevaluation and self.reevaluation.gain, self.rule.contest
        numbers = {} if gain is None else {"gain": gain.nats, "gain_low": gain.low, "gain_high": gain.high}
        numbers |= {"seed_deviation": pooled_deviation(self.final_seeds)}
        return numbers | ({"num_tied": len(contest.tied)} if contest and contest.differences else {})

    def _tied_text(self) -> str:
        """Return the numbers of the trials that cannot be told apart from the lowest, as a tag."""
        contest = self.rule.contest
        if contest is None or not contest.differences:
            return "not compared"
        return ", ".join(map(str, contest.tied)) or "none"

    def held_dict(self) -> dict[str, Any] | None:
        """Return the entry of leaderboard.json that says what `best/` holds."""
        return None if self.held is None else {"trial": self.held}


def judge(
    records: list[TrialRecord],
    rule: Rule,
    reevaluation: Reevaluation | None = None,
    held: int | None = None,
    final_seeds: tuple[SeedLosses, ...] = (),
) -> SweepVerdict:
    """Return the verdict on these records. final_seeds: see read_final_seeds.

    reevaluation: that of the winner, if it was just measured and written to `best/`. held: the
    trial in `best/` otherwise.
    """
    best = rule.best(records)
    earlier = [r for r in records if r.source is not None and r.outcome is Outcome.COMPLETE and r.score is not None]
    earlier = [record for record in earlier if record.keeps_limits]
    leader = min(earlier, key=lambda record: record.score, default=None)
    if leader is not None and best is not None and leader.score >= best.score:
        leader = None
    held = best.number if best is not None and reevaluation is not None else held
    above = [r for r in records if r.outcome in CONTENDERS and r.source is None and not r.keeps_limits] if best is None else []
    nearest = min(above, key=lambda record: (record.excess, record.number), default=None)
    return SweepVerdict(rule, best, reevaluation, held, leader, final_seeds, nearest)


def read_verdict(folder: SweepFolder, records: list[TrialRecord], rule: Rule) -> SweepVerdict:
    """Return the verdict on the records, with what the last end of the sweep measured.

    That counts only for the trial that was measured, at the loss that it has now: a resume may have
    found a better one or trained the same one on. Raises InputError for a damaged leaderboard.json.
    """
    file = folder.path / "leaderboard.json"
    board = load_json(file) if file.is_file() else {}
    if not isinstance(board, dict):
        raise InputError("file", str(file), "must be the JSON object that a sweep writes")
    known, best = board.get("reevaluation"), rule.best(records)
    again = Reevaluation.from_dict(known) if known else None
    held = held_trial(board)
    if not (folder.best.is_dir() or again):
        held = None
    is_of_best = again is not None and best is not None and held == best.number and again.trial_eval_loss == best.eval_loss
    return judge(records, rule, again if is_of_best else None, held, read_final_seeds(folder, records))


def held_trial(board: Any) -> int | None:
    """Return the trial whose adapter `best/` holds, from a leaderboard.json of any version."""
    if not isinstance(board, dict):
        return None
    held = board.get("best_folder")
    if isinstance(held, dict):
        return held.get("trial")
    return board.get("best_trial") if board.get("reevaluation") else None


def last_held(folder: SweepFolder) -> int | None:
    """Return what `best/` holds before this end of the sweep; None without one, or if not known."""
    if not folder.best.is_dir():
        return None
    try:
        return held_trial(json.loads((folder.path / "leaderboard.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None


def earlier_adapter(record: TrialRecord) -> Path:
    """Return the folder of the adapter of a trial of an earlier sweep. Its source names both."""
    sweep, _, trial = str(record.source).rpartition(" trial ")
    return SweepFolder(Path(sweep)).trial(int(trial)) / "adapter"
