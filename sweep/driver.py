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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

from engine.errors import StorageError, first_line
from engine.system.files import home_folder, storage_fault
from engine.system.provenance import provenance
from engine.system.signals import handled
from sweep.cli.console import make_console
from sweep.cluster.ray_environment import set_ray_environment
from sweep.cluster.slots import Hardware, local_hardware
from sweep.config.absolute_paths import with_absolute_paths
from sweep.config.confirmations import ADDRESS, CODE, credentials, refuse_unconfirmed
from sweep.config.resume_changes import apply_resume_changes
from sweep.config.sweep import ClusterConfig, parse_sweep_config
from sweep.execution.engine_commands import inspect, prepare
from sweep.execution.interruption import taken_signals
from sweep.execution.worker_config import REAL_ENGINE, EngineModules
from sweep.folder.flush import wait_until_flushed
from sweep.folder.sweep_folder import SweepFolder
from sweep.plan.feasibility import Feasibility, make_feasibility
from sweep.plan.forecast import card_line, check_any_fits, describe_forecast, no_forecast_line
from sweep.plan.sweep_plan import SweepPlan, make_sweep_plan
from sweep.tracking.prometheus import MetricsPage, serve
from sweep.tracking.tracker import make_tracker

INTERRUPTED = 130


def start(raw: dict[str, Any], *, dry_run: bool = False, engine: EngineModules = REAL_ENGINE) -> int:
    """Run a new sweep. Returns the exit code. Raises InputError before anything is written."""
    config = with_absolute_paths(parse_sweep_config(raw), Path.cwd())
    return _launch(make_sweep_plan(config, _find_hardware), None, dry_run, engine)


def resume(path: str, overrides: dict[str, Any], *, dry_run: bool = False, engine: EngineModules = REAL_ENGINE) -> int:
    """Continue a sweep from its folder. Returns the exit code.

    overrides: dotted path -> value, limited to the fields in sweep/config/resume_changes.py. Raises
    InputError.
    """
    folder = SweepFolder.open(path)
    if not dry_run:
        with folder.lock():  # refuse a second driver before preparing model and data
            pass
    config = apply_resume_changes(folder.read_config(), overrides)
    refuse_unconfirmed(config, overrides, os.environ, home_folder())
    return _launch(make_sweep_plan(config, _find_hardware), folder, dry_run, engine)


def _launch(plan: SweepPlan, folder: SweepFolder | None, dry_run: bool, engine: EngineModules) -> int:
    """Print the plan, check everything, and run.

    folder: None for a new sweep, whose folder is created once all checks have passed.
    """
    print(plan.describe(), flush=True)
    for warning in plan.warnings():
        print(f"WARNING: {warning}", file=sys.stderr)
    if folder is None and plan.config.sweep.warm_start:
        _check_warm_start(plan, {}, print)
    if dry_run:
        _forecast(plan, engine)
        return 0
    with handled(taken_signals(), _interrupt), _metrics_page(plan) as page:
        try:
            feasibility, data = _prepare(plan, engine)
        except KeyboardInterrupt:
            return _interrupted(folder)
        if folder is None:
            if plan.config.sweep.warm_start:
                _check_warm_start(plan, data)
            folder = SweepFolder.create(plan.config, datetime.now())
            folder.write_data(data)
        with _storage_errors(folder):
            return _run(plan, folder, engine, feasibility, page)


def _check_warm_start(plan: SweepPlan, data: dict[str, Any], say: Callable[[str], None] = lambda line: None) -> None:
    """Raise InputError if the sampler cannot learn from the sweeps in sweep.warm_start.

    data: digests of today's samples.
    """
    from sweep.study.earlier_sweeps import read_earlier  # loads Optuna, which takes half a second

    earlier = read_earlier(plan.config, plan.space, data)
    say(f"warm start {len(earlier)} trials from {', '.join(plan.config.sweep.warm_start)}")


def _forecast(plan: SweepPlan, engine: EngineModules) -> None:
    """Print what a dry run adds to the plan.

    It needs the model's config.json, but no weights, no data and no GPU.
    """
    config, cpu = plan.config, plan.slots.device == "cpu"
    if config.train.device == "cpu" or (config.cluster.card == "auto" and cpu):
        print(no_forecast_line(config.train.device), flush=True)
        return
    feasibility = make_feasibility(config.cluster.card, inspect(config.base(), engine.command), plan.kinds)
    print(describe_forecast(plan.space, plan.base(), feasibility, config.sweep.num_trials), flush=True)
    check_any_fits(plan.space, plan.base(), feasibility)


def _prepare(plan: SweepPlan, engine: EngineModules) -> tuple[Feasibility, dict[str, Any]]:
    """Check the whole sweep against model, data and card. Raises InputError if it cannot work.

    Returns the fit check for its trials, and digests of the samples.
    """
    print("preparing model and data ...", flush=True)
    facts = prepare(plan.probes(), engine.command)
    print("\n".join([f"model: {facts.layers}", *(f"model: {note}" for note in facts.model_notes)]), flush=True)
    print(f"data: {facts.num_train_samples:,} training and {facts.num_eval_samples:,} evaluation samples", flush=True)
    on_gpu = plan.slots.device == "cuda"
    feasibility = make_feasibility(plan.config.cluster.card, facts, plan.kinds) if on_gpu else Feasibility(None, None)
    if feasibility.predicts:
        print(f"{card_line(feasibility)}; trials that are predicted not to fit are not started", flush=True)
    check_any_fits(plan.space, plan.base(), feasibility)
    return feasibility, facts.data


def _run(plan: SweepPlan, folder: SweepFolder, engine: EngineModules, feasibility: Feasibility, page: MetricsPage | None) -> int:
    """Run everything from the folder's creation to the last line, with the folder's lock held."""
    with folder.lock():
        folder.write_config(plan.config)
        screen = make_console(sys.stdout, plan.num_rungs, plan.config.sweep.num_trials)
        tracker = make_tracker(plan.config, folder.path)
        tracker.on_sweep_started({"sweep.folder": str(folder.path), **provenance()}, folder.started_s)
        try:
            set_ray_environment(plan.config.cluster.address, plan.slots.num_slots if plan.has_mixed_cards else 1)
            from sweep.session import SweepSession  # loads ray, which reads that environment once

            return SweepSession(plan, folder, engine, feasibility, screen, tracker, page).run()
        except KeyboardInterrupt:
            screen.stop()
            code = _interrupted(folder)
            _report_so_far(folder)
            return code
        finally:
            screen.stop()
            wait_until_flushed()
            for warning in tracker.close(30.0):
                print(f"WARNING: {warning}", file=sys.stderr)


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
        print(f"\nstopped; nothing is lost. Go on with:\n  {_resume_command(folder)}", flush=True)
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


def _resume_command(folder: SweepFolder) -> str:
    """Return what to type to go on, with the confirmations that it will be asked for."""
    words, config = [f"resume={folder.path}"], folder.read_config()
    words += [f"{CODE}=true"] if config.model.trust_remote_code else []
    if config.tracking.uri and credentials(os.environ, home_folder()):
        words.append(f"{ADDRESS}={config.tracking.public_uri}")
    return f"python -m sweep {' '.join(map(shlex.quote, words))}"


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
        raise StorageError(f"{what}; nothing is lost: make room, then go on with: {_resume_command(folder)}") from error


def _interrupt(number: int, frame: Any) -> None:
    """Treat every signal that asks for an end like Ctrl-C."""
    raise KeyboardInterrupt
