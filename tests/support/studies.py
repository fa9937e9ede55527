"""Build studies and ledgers without Ray: configs over a small and a wide space, and reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

from engine.trial_report import TrialReport
from sweep.config.sweep import SweepConfig, parse_sweep_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.ledger.freezer import make_freezer
from sweep.ledger.ledger import Ledger
from sweep.ledger.limits import Limits
from sweep.space.parse import parse_space
from sweep.study.study import Study
from tests.support.reports import make_report

SMALL = {"lora.rank": {"choices": [2, 4, 8]}, "lora.use_rslora": {"choices": [True, False]}}
L = TypeVar("L", bound=Ledger)
WIDE = {**SMALL, "optim.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}


def config_for(
    space: dict, sampler: str = "random", pruner: str = "successive_halving", num_trials: int = 8, **sweep
) -> SweepConfig:
    return parse_sweep_config({
        "model": {"path": "m"}, "data": {"train": "t"}, "train": {"max_tokens": 400, "num_reports": 4}, "space": space,
        "sampler": {"name": sampler}, "pruner": {"name": pruner}, "sweep": {"num_trials": num_trials, **sweep},
    })  # fmt: skip


def study_in(path, config: SweepConfig) -> Study:
    return Study(SweepFolder(path), config, parse_space(config.space))


def ledger_in(
    path,
    config: SweepConfig,
    num_slots: int = 2,
    max_retries: int = 1,
    study: Study | None = None,
    kind: Callable[..., L] = Ledger,
    **options,
) -> L:
    sweep, study = config.sweep, study or study_in(path, config)
    limits = Limits(
        num_trials=sweep.num_trials, num_rungs=4, num_slots=num_slots, max_retries=max_retries, budget=config.effective_budget,
        objectives=sweep.objectives, grid=config.train.report_grid(),
    )  # fmt: skip
    freezer = make_freezer(config, parse_space(config.space), study, limits)
    return kind(study, SweepFolder(path), limits, freezer=freezer, **options)


def report(rung: int, loss: float, **changes) -> TrialReport:
    return make_report(rung, loss, **{"tokens_seen": 100 * rung, "num_trainable": 1, **changes})


def write_reports(path, number: int, reports: list[TrialReport]) -> None:
    lines = "".join(json.dumps(line.to_dict()) + "\n" for line in reports)
    (SweepFolder(path).trial(number) / "reports.jsonl").write_text(lines)


def finish_one(study: Study) -> int:
    """Ask for a trial and report its only rung; returns its number."""
    proposal = study.ask()
    study.report(proposal.number, 1, 1.0 / proposal.config.lora.rank)
    return proposal.number
