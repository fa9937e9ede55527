"""Drive the product's own searcher, scheduler, ledger and study, with journal and folder in memory.

Searcher and scheduler are those that Ray Tune gets, called as Tune calls them. The journal is
Optuna's as in a sweep: each record passes through JSON. Left out are the disk, its flushes, and
Ray's processes. A proposal is replaced by the nearest recorded config, and that is what the journal
and the sampler hold. A config that was trained is proposed no more, as in every sweep.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial, TrialState

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.shape.model_shape import ModelShape
from engine.trial_report import TrialReport
from sweep.config.budget_limits import BudgetConfig
from sweep.config.sweep import SweepConfig, parse_sweep_config
from sweep.curves.setup_price import SetupPrice
from sweep.folder.sweep_folder import SweepFolder
from sweep.ledger.freezer import make_freezer
from sweep.ledger.ledger import Ledger
from sweep.ledger.limits import Limits
from sweep.prior.beginning import make_beginning
from sweep.space.space import Space
from sweep.study.journal import STUDY_NAME
from sweep.study.study import Study
from sweep.trials.record import Outcome, TrialRecord
from sweep.trials.selection import Rule

from .clock import Choice, Turn
from .points import Task
from .tune_hooks import TuneHooks

HOUR_S = 3600.0  # one slot's time for a full trial
SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True,
}  # fmt: skip
"""The recorded base model, SmolLM2-135M: the prior's rate follows from its hidden size."""
MANY = 1_000_000  # trials: the budget ends the sweep


class ProductSide:
    """Decide as a sweep of the product does."""

    def __init__(
        self, task: Task, values: Mapping[str, Any], num_slots: int, cost: float, clock: Callable[[], float],
        setup: tuple[float, float] = (0.0, 0.0),
    ) -> None:  # fmt: skip
        """values: sections of the sweep's config. cost: full trials at which the budget ends. setup: see Clock."""
        self._task, config = task, sweep_config(task, values)
        self._folder, self._records = MemoryFolder(), {}
        self._study = study = RecordedStudy(self._folder, config, RecordedSpace(task))
        beginning = make_beginning(config, study.space, ModelShape.of(SMOLLM2, "SMOLLM2"))
        study.beginning.keep(beginning.points(), beginning.rate)
        study.setup_price.keep(SetupPrice(*(round(price * task.grid[-1]) for price in setup)))
        limits = Limits(
            num_trials=config.sweep.num_trials,
            num_rungs=len(task.grid),
            num_slots=num_slots,
            max_retries=0,
            budget=BudgetConfig(full_trials=cost),
            grid=task.grid,
        )
        freezer = make_freezer(config, study.space, study, limits)
        self._ledger = Ledger(
            study, self._folder, limits, freezer=freezer, listeners=(self,), clock=lambda: HOUR_S * clock(), monotonic=clock
        )
        self._ledger.timeline._add = self._ledger.timeline._apply  # the sums that a budget needs, without the file
        self._ledger.recover()
        self._hooks = TuneHooks(self._ledger, self._folder, num_slots)

    def on_trial_updated(self, record: TrialRecord) -> None:
        self._records[record.number] = record

    def next_trial(self) -> Turn | None:
        suggested = self._hooks.suggest()
        if suggested is None:
            return None
        number, num_heard = suggested
        return Turn(number, self._task.nearest(self._records[number].params), num_heard + 1)

    def reported(self, turn: Turn, eval_loss: float) -> bool:
        report = self._report(turn, eval_loss)
        if turn.rung == len(self._task.grid):
            self._hooks.ended(turn.number, Outcome.COMPLETE, report)
            return False
        return self._hooks.reported(turn.number, report)

    def diverged(self, turn: Turn) -> None:
        self._hooks.ended(turn.number, Outcome.DIVERGED)

    def chosen(self) -> Choice | None:
        """Return the winner by the product's rule, as if the budget ended now."""
        records = [
            replace(record, outcome=Outcome.STOPPED) if record.outcome is Outcome.RUNNING else record
            for record in self._records.values()
        ]
        best = Rule().best(records)
        if best is None:
            return None
        report = min(best.reports, key=lambda one: one.eval_loss)
        return Choice(self._task.nearest(best.params), report.rung)

    def _report(self, turn: Turn, eval_loss: float) -> TrialReport:
        reports, tokens = self._folder.trial_reports.setdefault(turn.number, []), self._task.grid[turn.rung - 1]
        best = min([eval_loss, *(report.eval_loss for report in reports[-1:])])
        reports.append(TrialReport(
            rung=turn.rung, tokens_seen=tokens, target_tokens_seen=tokens, step=turn.rung, epoch=0.0, train_loss=eval_loss,
            eval_loss=eval_loss, best_eval_loss=best, learning_rate=0.0, grad_norm=1.0, tokens_per_second=1.0, step_time_ms=1.0,
            peak_allocated_gib=1.0, elapsed_s=HOUR_S * tokens / self._task.grid[-1],
            num_trainable=self._task.points[turn.point].num_trainable,
        ))  # fmt: skip
        return reports[-1]


def sweep_config(task: Task, values: Mapping[str, Any]) -> SweepConfig:
    """Return the config of a sweep over the task's space. values: sections, such as sampler."""
    fixed = {
        "model": {"path": "m"},
        "data": {"train": "t"},
        "train": {"max_tokens": task.grid[-1], "report_at_tokens": list(task.grid)},
    }
    sections = {name: {**fixed.get(name, {}), **task.fixed.get(name, {})} for name in {*fixed, *task.fixed}}
    sweep = {"num_trials": MANY, **values.get("sweep", {})}
    return parse_sweep_config({**sections, "space": task.space_section, **values, "sweep": sweep})


class RecordedSpace(Space):
    """Give each point of the space the config of the nearest recorded one.

    So the study knows two points that train the same config as one. Who enumerates the space finds
    the recorded configs.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task.space.dimensions)
        object.__setattr__(self, "task", task)

    def apply(self, base: Mapping[str, Any], params: Mapping[str, Any]) -> TrainConfig:
        index = self.task.nearest(params)
        known, key = self.task.configs, tuple(self.task.points[index].params.values())
        if key not in known:  # the same in every replay of the task
            config = parse(TrainConfig, super().merged(base, self.point(index))).model_dump(mode="json")
            for section, values in self.task.points[index].settings.items():
                config[section] |= values
            known[key] = _Config.of(parse(TrainConfig, config))
        return known[key]

    def merged(self, base: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
        return self.apply(base, params).model_dump(mode="json")

    def point(self, index: int) -> dict[str, Any]:
        """Return the recorded config's value on each axis."""
        params = self.task.points[index].params
        return {dimension.path: params[dimension.path] for dimension in self.dimensions}

    def size(self) -> int:
        return len(self.task.points)

    def points(self) -> Iterator[dict[str, Any]]:
        return map(self.point, range(self.size()))


class _Config(TrainConfig):
    """Remember the fingerprint and the plain data of a config, which a replay asks for often."""

    @classmethod
    def of(cls, config: TrainConfig) -> TrainConfig:
        made = cls.model_construct(**{name: getattr(config, name) for name in type(config).model_fields})
        object.__setattr__(made, "fingerprint", cache(config.fingerprint))
        plain = config.model_dump(mode="json")
        object.__setattr__(made, "model_dump", lambda mode="json": plain)
        return made


class RecordedStudy(Study):
    """Enter the nearest recorded config in the place of what the sampler proposed.

    A random draw is one of the recorded configs, each with the same chance: the recorded design is
    spread evenly over the space, but the regions nearest to its points are not equally large.
    """

    def __init__(self, folder: SweepFolder, config: SweepConfig, space: RecordedSpace) -> None:
        super().__init__(folder, config, space)
        self.space = space
        self._is_grid |= config.sampler.name == "random"  # walks shuffled_points

    @staticmethod
    def _open(
        folder: SweepFolder, pruner: optuna.pruners.BasePruner, num_objectives: int
    ) -> tuple[optuna.storages.JournalStorage, optuna.Study]:
        storage = optuna.storages.JournalStorage(MemoryJournal())
        return storage, optuna.create_study(
            storage=storage, study_name=STUDY_NAME, pruner=pruner, directions=["minimize"] * num_objectives
        )

    def _enter(self, trial: FrozenTrial) -> int:
        recorded = self._space.point(self._space.task.nearest(trial.params))
        if recorded != dict(trial.params):
            trial.params = recorded
            self._forget_draft()
        return super()._enter(trial)

    def is_new(self, params: dict[str, Any]) -> bool:
        return self._config(params).fingerprint() not in self._tried  # no recorded config is refused

    def _forget_draft(self) -> None:
        """End the sampler's own draft, so that its copy gets the journal's trial."""
        proposer = self._proposer
        if proposer._copy is not None and proposer._draft_id is not None:
            proposer._copy._storage.set_trial_state_values(proposer._draft_id, TrialState.FAIL)
            proposer._draft_id = None
            if proposer._keeps_numbers:
                proposer._copy = None


class MemoryJournal(BaseJournalBackend):
    """Keep the journal's lines in memory."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        return map(json.loads, self._lines[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self._lines += [json.dumps(log, separators=(",", ":")) for log in logs]


class MemoryFolder(SweepFolder):
    """Keep the reports of the trials in memory, and drop what no replay reads."""

    def __init__(self) -> None:
        super().__init__(Path("/nonexistent"))
        self.timeline, self.trial_reports = Path(os.devnull), {}

    def write_train_config(self, number: int, config: TrainConfig) -> None:
        pass

    def write_result(self, number: int, result: dict[str, Any]) -> None:
        pass

    def has_result(self, number: int) -> bool:
        return True

    def reports(self, number: int) -> list[TrialReport]:
        return list(self.trial_reports.get(number, ()))
