"""Run one session of a sweep, with everything that works on its folder in that time.

A session lasts from the driver's start to its end. This module loads ray, so call
`set_ray_environment` before its first import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

from engine.config.trial import TrainConfig
from sweep.cli.console import Screen
from sweep.cluster.card_kinds import Label
from sweep.cluster.early_ray import leave_early_ray
from sweep.execution.engine_commands import Standby, evaluate
from sweep.execution.remote_evaluation import evaluate_on_a_slot
from sweep.execution.tuner import run_trials
from sweep.execution.worker_config import EngineModules
from sweep.folder.sweep_folder import SweepFolder
from sweep.folder.timeline import spent_on_finals
from sweep.ledger.event_files import make_event_files
from sweep.ledger.freezer import make_freezer
from sweep.ledger.ledger import Ledger
from sweep.ledger.limits import Limits
from sweep.ledger.steered_ledger import SteeredLedger
from sweep.ledger.time_left import TimeLeft
from sweep.plan.feasibility import Feasibility
from sweep.plan.sweep_plan import SweepPlan
from sweep.report.build import try_write_report
from sweep.results.finals_ledger import FinalsLedger
from sweep.results.finish import Evaluate, finish
from sweep.results.next_steps import next_steps
from sweep.study.earlier_sweeps import read_earlier
from sweep.study.study import Study
from sweep.tracking.prometheus import MetricsPage, SweepMetrics
from sweep.tracking.tracker import NullTracker, Tracker

NOTHING_KEPT = "an earlier version kept no digests of config, data and model; they are kept from now on, and changes refused"


@dataclass(frozen=True)
class SweepSession:
    """Run the trials that are left, and end the sweep.

    The caller holds the folder's lock, and closes screen and tracker. page: the page that
    Prometheus reads, None if the config asks for none. inputs: the digests of what all trials share,
    as the sweep began.
    """

    plan: SweepPlan
    folder: SweepFolder
    engine: EngineModules
    feasibility: Feasibility
    screen: Screen
    tracker: Tracker | NullTracker
    page: MetricsPage | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _standby(self) -> Standby:
        return Standby(self.engine.command)

    def run(self) -> int:
        """Run the session. Returns the exit code: 0 if there is an adapter to use, else 1."""
        try:
            return self._run()
        finally:
            self._standby.close()

    def _run(self) -> int:
        self.screen.note(f"sweep folder {self.folder.path}")
        ledger = self._open_ledger()
        if ledger.has_work():
            self.screen.start()
            run_trials(
                ledger, self.plan.slots, self.plan.config.cluster.address, self.folder, self.engine,
                note=self.screen.note, avoid=self._avoid, inputs=self.inputs, calibrate=self.plan.config.cluster.calibrate,
                on_running_out=self._prepare_evaluation, on_turn=ledger.poll,
            )  # fmt: skip
            self.screen.stop()
        if ledger.shortfall:
            self.screen.note(ledger.shortfall)
        self._train_finalists_again(ledger)
        leave_early_ray()  # it still runs if no trial was left
        return self._finish(ledger)

    def _train_finalists_again(self, search: Ledger) -> None:
        """Train the best trials again with other seeds, if the config asks for it."""
        finals = FinalsLedger(
            self.plan, self.folder, self.feasibility.check_fit, self.inputs, self.screen.note, self.tracker.on_final_seed_updated
        )
        ledger = finals.open(search)
        if ledger is None:
            return
        if ledger.has_work():
            run_trials(
                ledger, self.plan.slots, self.plan.config.cluster.address, finals.own_folder, self.engine,
                note=self.screen.note, avoid=self._avoid, inputs=self.inputs,
            )  # fmt: skip
        if ledger.shortfall:
            self.screen.note(f"final seeds  {ledger.shortfall}")

    def _open_study(self) -> Study:
        """Open the study in the journal.

        Adds what the sweep begins with, and the trials of earlier sweeps if the config names some
        and they are not in yet.
        """
        config, space = self.plan.config, self.plan.space
        study = Study(self.folder, config, space, self.feasibility.check_fit)
        if not study.keep_begun_with(config, self.inputs):
            self.screen.note(NOTHING_KEPT)
        earlier = None
        if config.sweep.warm_start and not study.has_earlier_trials:
            earlier = read_earlier(config, space, self.folder.read_data() or {})
        beginning = self.plan.beginning
        study.beginning.keep(beginning.points(earlier.first_points if earlier else ()), beginning.rate)
        if earlier is not None:
            study.take_over(earlier)
            if line := study.beginning.known_line(study.is_new):
                self.screen.note(line)
        return study

    def _open_ledger(self) -> SteeredLedger:
        """Open the ledger, and catch up with what the previous driver may not have heard."""
        study, metrics = self._open_study(), self._make_metrics()
        limits = Limits.of(self.plan, elsewhere_s=spent_on_finals(self.folder))
        time_left = TimeLeft(limits, self.plan.config.train.report_grid(), self.plan.space.size())
        # the first one, so that a line about an event already counts it
        others = [metrics, make_event_files(self.plan.config, self.folder.path, self.screen.note)]
        listeners = (time_left, self.screen, self.tracker, *(other for other in others if other is not None))

        def take_limits(limits: Limits) -> None:
            time_left.take_limits(limits)
            if metrics is not None:
                metrics.num_trials = limits.num_trials

        ledger = SteeredLedger(
            study, self.folder, limits, config=self.plan.config, space=self.plan.space, fit_check=self.feasibility.check_fit,
            on_limits=take_limits, freezer=make_freezer(self.plan.config, self.plan.space, study, limits), listeners=listeners,
            note=self.screen.note,
        )  # fmt: skip
        time_left.begin(ledger.timeline, ledger.clock)
        continued = ledger.recover()
        ledger.take_commands()
        self.screen.expect(time_left.text)
        if metrics is not None:
            metrics.begin(ledger.timeline, ledger.clock, time_left.seconds)
            self.page.register(metrics)
        if continued:
            trials = "trials" if len(continued) > 1 else "trial"
            self.screen.note(f"going on with {trials} {', '.join(map(str, continued))}")
        return ledger

    def _make_metrics(self) -> SweepMetrics | None:
        """Return the numbers that the page shows, or None if there is no page."""
        if self.page is None:
            return None
        return SweepMetrics(self.folder.path.name, self.plan.config.sweep.num_trials, self.plan.slots.num_slots)

    @property
    def _avoid(self) -> Callable[[TrainConfig], tuple[Label, ...]] | None:
        """Return a function from a config to the labels of nodes whose cards it does not fit.

        None if all cards are alike.
        """
        return self.feasibility.avoid if self.plan.has_mixed_cards else None

    def _finish(self, ledger: SteeredLedger) -> int:
        """Choose the best adapter, write best/, leaderboard and report, and tell the tracker."""
        config, records = ledger.config, ledger.records
        verdict, summary = finish(
            self.folder,
            records,
            sweep_name=config.sweep.name,
            device=self.plan.slots.device,
            engine_command=self.engine.command,
            note=self.screen.note,
            rule=config.rule,
            num_examples=config.sweep.num_examples,
            evaluate=self._evaluation(),
        )
        ended_s = max((record.ended_s or 0.0 for record in records), default=self.folder.started_s)
        is_measured = verdict.reevaluation is not None
        self.tracker.on_sweep_finished(summary, verdict.best, self.folder.best if is_measured else None, ended_s)
        try_write_report(self.folder, self.screen.note)
        self.screen.note(next_steps(self.folder, config, self.plan.space, is_measured, ledger.is_finished))
        return 0 if is_measured else 1

    def _prepare_evaluation(self) -> None:
        if self.plan.config.cluster.address is None:  # else a worker's node measures
            self._standby.start()

    def _evaluation(self) -> Evaluate:
        """Return what measures the winner again: here, or on a slot of the existing cluster."""
        address = self.plan.config.cluster.address
        if address is None:
            return partial(evaluate, inputs=self.inputs, standby=self._standby)
        return evaluate_on_a_slot(self.plan.slots, address, self.folder.log, self._avoid, self.inputs)
