"""Open the ledger of the finalists, which are trained again with other seeds.

It is a small sweep in a folder of its own, so its trials have journal, checkpoints and adapters as
all others, and sampler and pruner of the search never see them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sweep.config.sweep import MAX_FINAL_SEEDS, NUM_FINALISTS, SweepConfig, parse_sweep_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.ledger.ledger import Ledger
from sweep.ledger.limits import Limits
from sweep.plan.sweep_plan import SweepPlan
from sweep.results.contest import with_contest
from sweep.results.final_seeds import SEED, finalists, without_seed
from sweep.space.parse import parse_space
from sweep.study.study import FitCheck, Study
from sweep.text import metrics_text
from sweep.trials.record import Outcome, TrialRecord

LARGE_SEED = 2**31  # above, seeds count down: a range of the space ends at 2**53


@dataclass(frozen=True)
class FinalsLedger:
    """Train a sweep's finalists again.

    note: shows a line to the user. track: hears of each state of such a trial, with the number that
    the sweep knows it by.
    """

    plan: SweepPlan
    folder: SweepFolder
    fit_check: FitCheck
    inputs: Mapping[str, str]
    note: Callable[[str], None]
    track: Callable[[TrialRecord, int], None] = lambda record, number: None

    @property
    def own_folder(self) -> SweepFolder:
        return SweepFolder(self.folder.final_seeds)

    def open(self, search: Ledger) -> Ledger | None:
        """Return a ledger with the trials that are left to run, or None if there are none.

        search: the sweep's own ledger, whose trials have ended. What both spend counts against one
        budget of hours. A loss that is good enough does not end this, and `full_trials` is the search's alone.
        """
        config, records = self.plan.config, search.records
        if config.sweep.final_seeds < 2:
            return None
        rule = with_contest(config.rule, records)
        chosen = finalists(rule, records)
        self._say_who_is_left_out(rule.best(records), chosen)
        if not chosen:
            return None
        points = _points(chosen, config.sweep.final_seeds)
        own, folder = _own_config(config), self.own_folder
        folder.path.mkdir(exist_ok=True)
        folder.write_config(own)
        folder.lock_file.touch()  # its time is that of the start; the sweep's own lock is held
        study = Study(folder, own, parse_space(own.space), self.fit_check)
        study.keep_begun_with(own, self.inputs)
        known = study.records()
        new = [point for point in points if all(record.params != point for record in known)]
        study.beginning.replace_points(points)
        own = {record.number: record.params for record in records if record.source is None and record.warm is None}
        tracking = FinalsTracking(own, self.track)
        if not new and all(record.outcome not in (Outcome.RUNNING, Outcome.STOPPED) for record in known):
            for record in known:  # the store may have missed them
                tracking.on_trial_updated(record)
            return None
        now_s, timeline = search.clock(), search.timeline
        limits = Limits.of(
            self.plan,
            num_trials=len(known) + len(new),
            budget=config.sweep.budget.model_copy(update={"target_loss": None, "target_metric": None, "full_trials": None}),
            elsewhere_s=(timeline.occupied_s(now_s), timeline.elapsed_s(now_s)),
        )
        names = {record.number: record.params for record in chosen}
        listeners = (FinalsLines(names, self.note), tracking)
        ledger = Ledger(study, folder, limits, listeners=listeners, note=self.note, clock=search.clock)
        ledger.recover()
        if ledger.has_work():
            names_text = " and ".join(f"trial {number}" for number in names)
            self.note(f"final seeds  training {names_text} again with other seeds")
        return ledger

    def _say_who_is_left_out(self, best: TrialRecord | None, chosen: list[TrialRecord]) -> None:
        """Tell the user if the winner is no finalist: it has not run to its end, or is a warm clone."""
        if best is None or (best.outcome is Outcome.COMPLETE and best.warm is None):
            return
        instead = "" if chosen else "; no trial is trained again"
        why = f"{best.outcome}, it has not run to its end"
        if best.warm is not None:
            why = f"{best.warm.text}, and what that trial had learnt would keep its seed"
        self.note(f"final seeds  without trial {best.number}, the best: {why}{instead}")


class FinalsLines:
    """Print a line when a finalist starts or ends. trials: number in the sweep -> its params."""

    def __init__(self, trials: Mapping[int, dict[str, Any]], note: Callable[[str], None]) -> None:
        self._trials, self._note = trials, note
        self._said: dict[int, Outcome] = {}

    def on_trial_updated(self, record: TrialRecord) -> None:
        if self._said.get(record.number) is record.outcome:
            return
        self._said[record.number] = record.outcome
        number = _number_of(record, self._trials)
        name = "an earlier finalist" if number is None else f"trial {number}"
        loss = "" if record.eval_loss is None else f"  eval loss {record.eval_loss:.4f}{metrics_text(record.metrics)}"
        error = "" if record.error is None else f"  {record.error}"
        what = "started" if record.outcome is Outcome.RUNNING and not record.reports else str(record.outcome)
        self._note(f"final seeds  {name} with seed {record.params[SEED]}  {what}{loss}{error}")


@dataclass(frozen=True)
class FinalsTracking:
    """Tell the tracker of the finalists' trials. trials: number in the sweep -> its params."""

    trials: Mapping[int, dict[str, Any]]
    track: Callable[[TrialRecord, int], None]

    def on_trial_updated(self, record: TrialRecord) -> None:
        number = _number_of(record, self.trials)
        if number is not None:
            self.track(record, number)


def _number_of(repeat: TrialRecord, trials: Mapping[int, dict[str, Any]]) -> int | None:
    """Return the number of the trial that this one repeats with another seed."""
    params = without_seed(repeat.params)
    return next((number for number, known in trials.items() if known == params), None)


def _points(chosen: list[TrialRecord], num_seeds: int) -> list[dict[str, Any]]:
    """Return the params to train, seed after seed, so that a spent budget leaves all finalists alike."""
    return [
        {**record.params, SEED: record.config["train"]["seed"] + step * _direction(record.config["train"]["seed"])}
        for step in range(1, num_seeds)
        for record in chosen
    ]


def _direction(seed: int) -> int:
    return 1 if seed < LARGE_SEED else -1


def _own_config(config: SweepConfig) -> SweepConfig:
    """Return the config of the small sweep: the same space and the seed. It does not depend on the finalists."""
    values, seed = config.model_dump(mode="json"), config.train.seed
    ends = sorted((seed + _direction(seed), seed + (MAX_FINAL_SEEDS - 1) * _direction(seed)))
    values["space"][SEED] = {"low": ends[0], "high": ends[1]}
    values["sampler"], values["pruner"] = {"name": "random"}, {"name": "none"}
    values["sweep"] |= {"num_trials": NUM_FINALISTS * (MAX_FINAL_SEEDS - 1), "final_seeds": 0, "warm_start": []}
    values["sweep"] |= {"first_trials": [], "prior": False}
    return parse_sweep_config(values)
