"""Run one sweep, from a plain config or an existing sweep folder to the best adapter.

The driver checks everything, prepares model and data in a subprocess, creates the folder, runs the
trials under Tune and chooses the best.

A kill at any moment leaves a folder that `resume` continues from. The journal is the record, and
Tune's own state is not used.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from engine.errors import StorageError, first_line
from engine.sources.identity import refuse_changed
from engine.system.files import home_folder, storage_fault
from engine.system.provenance import provenance
from engine.system.signals import handled
from sweep.cli.console import make_console, warn
from sweep.cluster.early_ray import EarlyRay, OwnRay
from sweep.cluster.ray_environment import set_ray_environment
from sweep.cluster.slots import Hardware, local_hardware
from sweep.config.absolute_paths import absolute_uri, with_absolute_paths
from sweep.config.confirmations import ADDRESS, refuse_unconfirmed
from sweep.config.resume_changes import apply_resume_changes
from sweep.config.sweep import ClusterConfig, SweepConfig, parse_sweep_config
from sweep.execution.engine_commands import print_sample
from sweep.execution.interruption import taken_signals
from sweep.execution.worker_config import REAL_ENGINE, EngineModules
from sweep.folder.flush import wait_until_flushed
from sweep.folder.notes import is_training
from sweep.folder.sweep_folder import SweepFolder
from sweep.plan.feasibility import Feasibility
from sweep.plan.forecast import describe_cards
from sweep.plan.idle_settings import refuse_idle_overrides
from sweep.plan.sweep_plan import SweepPlan, make_sweep_plan
from sweep.preflight import (
    check_and_forecast,
    check_places,
    check_sweep,
    check_warm_start,
    pinned_to_most_demanding,
    setting_warnings,
    with_beginning,
)
from sweep.results.next_steps import resume_command
from sweep.results.on_end import INTERRUPTED, tell_end
from sweep.tracking.mlflow_names import data_points, data_tags
from sweep.tracking.prometheus import MetricsPage, serve
from sweep.tracking.tracker import make_tracker
from sweep.trials.record import TrialRecord

if TYPE_CHECKING:
    from sweep.session import SweepSession

NOTHING: Mapping[str, Any] = MappingProxyType({})


def start(
    raw: dict[str, Any], *, given: Mapping[str, Any] = NOTHING, dry_run: bool = False, engine: EngineModules = REAL_ENGINE
) -> int:
    """Run a new sweep. Returns the exit code. Raises InputError before anything is written.

    given: dotted path -> value of the command line, which `raw` has been composed from.
    """
    config = with_absolute_paths(parse_sweep_config(raw), Path.cwd())
    plan = make_sweep_plan(config, _find_hardware)
    refuse_idle_overrides(config, plan.space, given)
    return _launch(plan.on_day(config.data.date or _earlier_day(config)), None, dry_run, engine, given)


def resume(path: str, overrides: dict[str, Any], *, dry_run: bool = False, engine: EngineModules = REAL_ENGINE) -> int:
    """Continue a sweep from its folder. Returns the exit code.

    overrides: dotted path -> value, limited to the fields in sweep/config/resume_changes.py. Raises
    InputError.
    """
    folder = SweepFolder.open(path)
    if not dry_run:
        with folder.lock():  # refuse a second driver before preparing model and data
            pass
    from sweep.study.begun_with import read_begun_with, read_unedited_config  # loads Optuna, which takes half a second

    if isinstance(uri := overrides.get(ADDRESS), str):
        overrides = {**overrides, ADDRESS: absolute_uri(uri, Path.cwd())}
    config = apply_resume_changes(read_unedited_config(folder), overrides)
    refuse_unconfirmed(config, overrides, os.environ, home_folder())
    plan = make_sweep_plan(config, _find_hardware, is_new=False)
    refuse_idle_overrides(config, plan.space, overrides)
    recorded = read_begun_with(folder).inputs
    recorded = folder.read_data() if recorded is None else recorded
    return _launch(plan, folder, dry_run, engine, overrides, recorded or {})


def show_sample(raw: dict[str, Any], options: list[str], *, engine: EngineModules = REAL_ENGINE) -> int:
    """Have the engine print a sample of this sweep's data. Returns the exit code."""
    config = with_absolute_paths(parse_sweep_config(raw), Path.cwd())
    return print_sample(config.base(), engine.command, options)


def _launch(
    plan: SweepPlan,
    folder: SweepFolder | None,
    dry_run: bool,
    engine: EngineModules,
    given: Mapping[str, Any] = NOTHING,
    recorded: Mapping[str, str] = NOTHING,
) -> int:
    """Print the plan, check everything, and run.

    folder: None for a new sweep, whose folder is created once all checks have passed. recorded: the
    digests of data and model that the sweep began with.
    """
    warnings = [*plan.warnings(), *setting_warnings(plan, folder is None, given)]
    print(plan.describe(), flush=True)
    warn(warnings)
    if folder is None and plan.config.sweep.warm_start and plan.config.train.max_epochs is None:  # else by the data's tokens
        check_warm_start(plan, {}, print)
    path = None if folder is None else folder.path
    if dry_run:
        return check_and_forecast(plan, engine, given, path)
    check_places(plan.config, path)
    engine = engine.for_trials(plan.config.sweep.num_trials, plan.slots)
    with handled(taken_signals(), _interrupt), _metrics_page(plan) as page, _early_ray(plan, engine) as early:
        try:
            plan, feasibility, facts = check_sweep(plan, engine, given, path)
            early.prepared()
            data = facts.data
        except KeyboardInterrupt:
            return _interrupted(folder)
        refuse_changed(plan.config.base(), recorded, data)
        if folder is None:
            plan = plan.on_day(plan.config.data.date or facts.day)
            if plan.config.sweep.warm_start:
                check_warm_start(plan, data)
            plan = pinned_to_most_demanding(plan, feasibility)
        plan = with_beginning(plan, facts, folder is None)
        if folder is None:
            folder = SweepFolder.create(plan.config, datetime.now())
            folder.write_data(data, facts.accounts)
        with _storage_errors(folder):
            return _announced(folder, plan, lambda: _run(plan, folder, engine, feasibility, page, {**data, **recorded}))


def _announced(folder: SweepFolder, plan: SweepPlan, run: Callable[[], int]) -> int:
    """Run the sweep, and tell its end, of whatever kind, to what tracking.on_end names."""
    code: int | None = None
    try:
        code = run()
        return code
    finally:
        warn(tell_end(plan.config, folder, code))


def _is_training(trial: TrialRecord) -> bool:
    return is_training(Path(trial.folder))


def _earlier_day(config: SweepConfig) -> str | None:
    """Return the day of the first sweep in sweep.warm_start that has one: its losses are of that day."""
    days = (SweepFolder.open(name, "sweep.warm_start").read_config().data.date for name in config.sweep.warm_start)
    return next(filter(None, days), None)


def _run(
    plan: SweepPlan,
    folder: SweepFolder,
    engine: EngineModules,
    feasibility: Feasibility,
    page: MetricsPage | None,
    inputs: Mapping[str, str],
) -> int:
    """Run everything from the folder's creation to the last line, with the folder's lock held."""
    with folder.lock():
        folder.write_config(plan.config)
        if feasibility.predicts:
            folder.write_card(describe_cards(feasibility))
        section = plan.config.sweep
        screen = make_console(sys.stdout, plan.num_rungs, section.num_trials, plan.config.rule, _is_training)
        tracker = make_tracker(plan.config, folder.path)
        accounts = folder.read_accounts()
        tags = {"sweep.folder": str(folder.path), **provenance(), **data_tags(accounts)}
        tracker.on_sweep_started(tags, folder.started_s, data_points(accounts))
        try:
            return _load_session(plan)(plan, folder, engine, feasibility, screen, tracker, page, inputs).run()
        except KeyboardInterrupt:
            screen.stop()
            code = _interrupted(folder)
            _report_so_far(folder)
            return code
        finally:
            screen.stop()
            wait_until_flushed()
            warn(tracker.close(30.0))


def _load_session(plan: SweepPlan) -> type[SweepSession]:
    """Load what runs the trials: ray, which reads its environment once, Optuna and plotly. It takes seconds."""
    _set_environment(plan)
    from sweep.session import SweepSession

    return SweepSession


def _set_environment(plan: SweepPlan) -> None:
    set_ray_environment(plan.config.cluster.address, plan.slots.num_slots if plan.has_mixed_cards else 1)


def _early_ray(plan: SweepPlan, engine: EngineModules) -> EarlyRay:
    """Return what starts our own Ray and loads the session while another process prepares model and data."""

    def load_ray() -> tuple[Callable[[OwnRay], None], Callable[[], None]]:
        _set_environment(plan)
        from sweep.cluster.own_ray import shut_down, start_ray  # loads ray, which reads that environment

        return start_ray, shut_down

    wanted = OwnRay(plan.slots, engine.worker_modules) if plan.config.cluster.address is None else None
    return EarlyRay(wanted, load_ray, lambda: _load_session(plan))


def _find_hardware(cluster: ClusterConfig) -> Hardware:
    """Return the hardware of this machine or, with an address, of the cluster there.

    The driver joins that cluster and leaves it again.
    """
    if cluster.address is None:
        return local_hardware(cluster)
    set_ray_environment(cluster.address)
    from sweep.cluster.connect import inspect_cluster  # loads ray, which reads that environment

    return inspect_cluster(cluster.address, 0 if cluster.num_gpus == "auto" else cluster.num_gpus, cluster.wait_s)


def _metrics_page(plan: SweepPlan) -> AbstractContextManager[MetricsPage | None]:
    """Open the page that Prometheus reads.

    The driver does this before the long preparation, so that an unusable address or port is refused
    at once.
    """
    if plan.config.tracking.metrics_port is None:
        return nullcontext()
    return serve(plan.config.tracking, lambda line: print(line, flush=True))


def _interrupted(folder: SweepFolder | None) -> int:
    if folder is None:
        print("\nstopped before the sweep began; nothing was written", file=sys.stderr)
    else:
        print(f"\nstopped; nothing is lost. Go on with:\n  {resume_command(folder)}", flush=True)
    return INTERRUPTED


def _report_so_far(folder: SweepFolder) -> None:
    """Write the report of an interrupted sweep. A second signal ends this.

    The driver has printed the line to resume by, so no one has to wait for the report.
    """
    from sweep.report.build import try_write_report  # loads Optuna and plotly, slowly

    try:
        try_write_report(folder, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print(f"no report was written; to write one: python -m sweep.report {shlex.quote(str(folder.path))}", flush=True)


@contextmanager
def _storage_errors(folder: SweepFolder) -> Iterator[None]:
    """Turn a full, read-only or failing disk into one line that says what to do.

    It does so wherever the driver meets the error.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, StorageError) and storage_fault(error) is None:
            raise
        what = str(error) if isinstance(error, StorageError) else f"{folder.path} cannot be written ({first_line(error)})"
        raise StorageError(f"{what}; nothing is lost: make room, then go on with: {resume_command(folder)}") from error


def _interrupt(number: int, frame: Any) -> None:
    """Treat every signal that asks for an end like Ctrl-C."""
    raise KeyboardInterrupt
