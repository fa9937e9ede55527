"""Check a sweep before anything is written or paid for: settings, places, model, data and card."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.command_answers import Facts, PreparedFacts
from engine.config.preference_section import PREFERENCE
from engine.errors import printable
from engine.system.files import require_home
from engine.units import counted
from sweep.cli.console import warn
from sweep.cluster.ray_folder import settle_ray_folder
from sweep.config.sweep import ClusterConfig, SweepConfig
from sweep.execution.engine_commands import CommandFailed, inspect, prepare
from sweep.execution.new_card import measure_new_card
from sweep.execution.worker_config import EngineModules
from sweep.folder.output_folder import check_output_folder
from sweep.ledger.event_files import check_event_files
from sweep.plan.answers_forecast import answers_line
from sweep.plan.disk_need import check_disk
from sweep.plan.feasibility import Feasibility, make_feasibility
from sweep.plan.forecast import (
    card_line,
    check_any_fits,
    describe_forecast,
    evaluation_warning_of,
    most_demanding,
    no_forecast_line,
)
from sweep.plan.idle_settings import idle_settings
from sweep.plan.matmul_choice import with_chosen_matmul
from sweep.plan.reference_forecast import reference_line
from sweep.plan.rungs import check_rungs
from sweep.plan.samples import data_warnings, mixture_line, passes_line, unchecked_line
from sweep.plan.sweep_plan import SweepPlan
from sweep.plan.trial_hours import least_reports
from sweep.results.on_end import check_on_end
from sweep.text import params_text
from sweep.tracking.store_check import check_store


def check_places(config: SweepConfig, sweep_folder: Path | None) -> None:
    """Raise InputError if a folder or the MLflow store cannot work; print what may work later.

    sweep_folder: None for a new sweep.
    """
    require_home()
    output = Path(config.sweep.output_dir) if sweep_folder is None else sweep_folder.absolute().parent
    if sweep_folder is None:
        check_output_folder(output)
    if config.cluster.address is None:
        line = settle_ray_folder(os.environ)
        if line is not None:
            print(f"note       {line}", flush=True)
    check_on_end(config.tracking.on_end)
    check_event_files(config.tracking.tensorboard)
    warn(check_store(config, output))


def setting_warnings(plan: SweepPlan, is_new: bool, given: Mapping[str, Any]) -> list[str]:
    """Return the warnings about settings. Raises InputError for rungs that a new sweep cannot have."""
    if not is_new:
        return []
    rungs = check_rungs(plan.config, plan.space)
    return [*idle_settings(plan.config, plan.space, given), *([] if rungs is None else [rungs])]


def check_warm_start(plan: SweepPlan, data: dict[str, Any], say: Callable[[str], None] = lambda line: None) -> None:
    """Raise InputError if a sweep in sweep.warm_start is of no use; name those of other data.

    data: digests of today's samples and base model.
    """
    from sweep.study.earlier_sweeps import read_earlier  # loads Optuna, which takes half a second

    earlier = read_earlier(plan.config, plan.space, data)
    say(f"warm start {counted(len(earlier.trials), 'trial')} from {', '.join(plan.config.sweep.warm_start)}")
    for note in earlier.notes:
        print(f"warm start {note}", flush=True)


def with_beginning(plan: SweepPlan, facts: Facts, is_new: bool) -> SweepPlan:
    """Return the plan with the trials that it begins with. Those of a new sweep are printed."""
    plan = plan.for_model(facts.shape)
    if is_new and (lines := plan.beginning.describe()):
        print("\n".join(map(printable, lines)), flush=True)
    return plan


def check_and_forecast(
    plan: SweepPlan, engine: EngineModules, given: Mapping[str, Any], sweep_folder: Path | None = None
) -> int:
    """Check model, data and disk as a start does, and print the forecast. Returns the exit code.

    sweep_folder: None for a new sweep.
    What only the hub has, and does not deliver now, is left unchecked, and a line says so. A fault
    is raised after the forecast, which needs no more than the model's config.json.
    """
    faults: list[CommandFailed] = []
    try:
        plan, facts = _checked(plan, engine, given, sweep_folder is None)
        with_beginning(plan, facts, sweep_folder is None and not plan.config.sweep.only_most_demanding)
        _forecast(plan, engine, facts, sweep_folder is None)
        _check_disk(plan, facts, sweep_folder)
    except CommandFailed as error:
        faults.append(error)
        try:
            _forecast(plan, engine, None, sweep_folder is None)
        except CommandFailed as error:
            faults.append(error)
    lines = {unchecked_line(plan.config, fault.line): fault for fault in reversed(faults)}
    if None in lines:
        raise lines[None]
    for line in lines:
        print(line, flush=True)
    return 0


def _forecast(plan: SweepPlan, engine: EngineModules, facts: Facts | None, is_new: bool) -> None:
    """Print the predictions, which need neither weights nor a GPU. facts: None if still to be found."""
    config, cpu = plan.config, plan.slots.device == "cpu"
    if config.train.device == "cpu" or (config.cluster.card == "auto" and cpu):
        print(no_forecast_line(config.train.device), flush=True)
        _say_answers(plan, None, facts)
        return
    facts = inspect(config.base(), engine.command) if facts is None else facts
    feasibility = make_feasibility(config.cluster.card, facts, plan.kinds)
    plan, lines = with_chosen_matmul(plan, feasibility, is_new)
    num_trials, full_trials = config.sweep.num_trials, config.effective_budget.full_trials
    least = least_reports(config)
    text, warning = describe_forecast(plan.space, plan.base(), feasibility, num_trials, full_trials, facts, least)
    print("\n".join([*lines, text]), flush=True)
    _say_answers(plan, feasibility, facts)
    warn([warning] if warning and is_new else [])
    check_any_fits(plan.space, plan.base(), feasibility)


def _say_answers(plan: SweepPlan, feasibility: Feasibility | None, facts: Facts | None) -> None:
    """Print what the reference model and the task metrics will take, if there are any and the samples are known."""
    if isinstance(facts, PreparedFacts):
        base, (shape, card) = plan.config.base(), (feasibility.shape, feasibility.card) if feasibility else (None, None)
        lines = [answers_line(base, shape, card, facts)]
        if plan.config.data.format == PREFERENCE:
            evaluation = feasibility.check_fit(base).evaluation if feasibility and feasibility.predicts else None
            lines.append(reference_line(base, facts, evaluation.tokens_per_second if evaluation else None))
        for line in filter(None, lines):
            print(line, flush=True)


def check_sweep(
    plan: SweepPlan, engine: EngineModules, given: Mapping[str, Any], sweep_folder: Path | None = None
) -> tuple[SweepPlan, Feasibility, PreparedFacts]:
    """Check the whole sweep against model, data, disk and card. Raises InputError if it cannot work.

    Returns the plan with its budget of tokens and its products chosen, the fit check for its trials, and what was found.
    """
    plan, facts = _checked(plan, engine, given, sweep_folder is None)
    _check_disk(plan, facts, sweep_folder)
    config = plan.config
    on_gpu = plan.slots.device == "cuda"
    if on_gpu:
        _calibrate(config.cluster, facts, engine)
    feasibility = make_feasibility(config.cluster.card, facts, plan.kinds) if on_gpu else Feasibility(None, None)
    if feasibility.predicts:
        print(f"{card_line(feasibility)}; trials that are predicted not to fit are not started", flush=True)
    plan, lines = with_chosen_matmul(plan, feasibility, sweep_folder is None)
    print("".join(f"{line}\n" for line in lines), end="", flush=True)
    check_any_fits(plan.space, plan.base(), feasibility)
    if sweep_folder is None:
        limits = config.sweep.num_trials, config.effective_budget.full_trials
        warning = evaluation_warning_of(plan.space, plan.base(), feasibility, *limits, facts, least_reports(config))
        warn([] if warning is None else [warning])
    return plan, feasibility, facts


def _check_disk(plan: SweepPlan, facts: PreparedFacts, sweep_folder: Path | None) -> None:
    warn(check_disk(plan, facts, sweep_folder, lambda line: print(line, flush=True)))


def _calibrate(cluster: ClusterConfig, facts: Facts, engine: EngineModules) -> None:
    """Have this machine's card measured, if nobody has. A cluster's workers do it on their nodes."""
    if cluster.calibrate and cluster.address is None and facts.card is not None:
        fault = measure_new_card(facts.card.name, engine.command, lambda line: print(line, flush=True))
        warn([] if fault is None else [fault])


def _checked(
    plan: SweepPlan, engine: EngineModules, given: Mapping[str, Any], is_new: bool
) -> tuple[SweepPlan, PreparedFacts]:
    """Return the plan with its budget of tokens, and what the engine finds in model and data.

    Raises CommandFailed if they cannot work. A sweep that goes on keeps the budget that it began with.
    """
    print("preparing model and data ...", flush=True)
    facts = prepare(plan.probes(), engine.command)
    print("\n".join(["model: " + line for line in (facts.layers, *facts.model_notes)]), flush=True)
    samples = counted(facts.num_eval_samples, "evaluation sample")
    print(f"data: {facts.num_train_samples:,} training and {samples}", flush=True)
    if facts.day is not None:
        print(f"data: the chat template prints a day; this sweep's is {facts.day} (data.date)", flush=True)
    for account in facts.accounts:
        print(f"data: {account.line()}", flush=True)
    if is_new and plan.config.train.max_epochs is not None:
        plan = _within_epochs(plan, facts)
        if plan.config.sweep.warm_start:
            check_warm_start(plan, {}, print)
    if (line := passes_line(plan.config, facts)) is not None:
        print(f"data: {line}", flush=True)
    if line := mixture_line(plan.config, facts):
        print(f"data: {line}", flush=True)
    warn(dict.fromkeys(line for account in facts.accounts for line in account.warnings()))
    warn(data_warnings(plan.config, facts, given))
    return plan, facts


def _within_epochs(plan: SweepPlan, facts: PreparedFacts) -> SweepPlan:
    """Return the plan whose trials end after train.max_epochs: of the length that leaves fewest tokens, for all alike."""
    most = plan.config.train.max_tokens
    plan = plan.within_epochs(facts.num_train_tokens)
    loop = plan.config.train
    if loop.max_tokens < most:
        grid = ", ".join(f"{tokens:,}" for tokens in loop.report_grid())
        line = f"{loop.max_tokens:,} tokens a trial, by train.max_epochs = {loop.max_epochs:g}; rungs at tokens seen: {grid}"
        print(f"budget     {line}", flush=True)
    else:
        print(f"budget     {most:,} tokens a trial, which end before train.max_epochs = {loop.max_epochs:g}", flush=True)
    return plan


def pinned_to_most_demanding(plan: SweepPlan, feasibility: Feasibility) -> SweepPlan:
    """Return the plan of the one point to try, if sweep.only_most_demanding asks for that."""
    if not plan.config.sweep.only_most_demanding or not plan.space.dimensions:
        return plan
    params = most_demanding(plan.space, plan.base(), feasibility)
    print(f"trial of the most demanding point: {params_text(params)}", flush=True)
    return plan.pinned(params)
