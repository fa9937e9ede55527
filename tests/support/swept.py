"""Make a sweep folder as a driver leaves it in the middle of a sweep: journal, timeline, reports."""

from __future__ import annotations

from pathlib import Path

from engine.trial_report import TrialReport
from sweep.config.sweep import parse_sweep_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.folder.timeline import Timeline
from sweep.space.parse import parse_space
from sweep.study.study import Study
from sweep.trials.record import Outcome
from tests.support.reports import make_report

TAG = "<script>alert(1)</script>"
SPACE = {
    "lora.rank": {"choices": [2, 4, 8]},
    "lora.target_modules": {"choices": {TAG: ["q_proj"], "all-linear": "all-linear"}},
    "optim.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
}
OUTCOMES = (Outcome.PRUNED, Outcome.COMPLETE, Outcome.FAILED, Outcome.COMPLETE, Outcome.DIVERGED, Outcome.COMPLETE)


def reports_of(number: int, count: int, metric: str | None = None) -> list[TrialReport]:
    return [
        make_report(
            rung, 3.0 - 0.1 * number - 0.2 * rung, tokens_seen=100 * rung, num_trainable=8, elapsed_s=2.0 * rung,
            peak_allocated_gib=1.0 + number, predicted_peak_gib=1.5 + number,
            metrics={} if metric is None else {metric: 0.1 * rung + 0.01 * number},
        )
        for rung in range(1, count + 1)
    ]  # fmt: skip


def swept(path: Path, outcomes=OUTCOMES, space=SPACE, metric: str | None = None) -> SweepFolder:
    """Make a folder with trials of these outcomes, and one that still runs. metric: what decides, if not the loss."""
    folder = SweepFolder(path)
    path.mkdir(exist_ok=True)
    config = parse_sweep_config({
        "model": {"path": "m"}, "data": {"train": "t"}, "train": {"max_tokens": 400, "num_reports": 4}, "space": space,
        "sampler": {"name": "random"}, "pruner": {"name": "none"},
        **({"metrics": {metric: True, "at": "every"}, "sweep": {"objectives": [metric]}} if metric else {}),
    })  # fmt: skip
    folder.write_config(config)
    study, timeline = Study(folder, config, parse_space(config.space)), Timeline(folder.timeline)
    timeline.start_session(1000.0)
    for number, outcome in enumerate([*outcomes, None]):
        assert study.ask().number == number
        reports = reports_of(number, 4 if outcome is Outcome.COMPLETE else 2, metric)
        folder.trial(number).mkdir(parents=True, exist_ok=True)
        folder.write_reports(number, reports)
        begin_s = 1000.0 + 10.0 * number
        timeline.on_assigned(number, begin_s)
        timing = {"slot": "gpu 0", "began_s": begin_s, "parts": {"train": 0.2, "eval": 0.1}}
        timing |= {"dead_time_s": 0.5} if number else {}
        for line in reports:
            study.report(number, line.rung, line.eval_loss)
            timeline.on_reported(number, begin_s + 1.0, timing)
        if outcome is not None:
            study.tell(number, outcome, error=f"no {TAG}" if outcome is Outcome.FAILED else None)
            timeline.on_ended(number, begin_s + 9.0, timing)
    return folder
