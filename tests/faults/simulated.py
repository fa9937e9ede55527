"""Run a sweep without Ray: real study, ledger and folder, and a kill at any write to disk.

The workers take turns.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.sources.identity import ADAPTER_FILES, refuse_other_start
from engine.system.files import write_text
from engine.trial_report import CHECKPOINT, read_reports
from sweep.config.sweep import parse_sweep_config
from sweep.folder.flush import wait_until_flushed
from sweep.folder.notes import LEAVE
from sweep.folder.sweep_folder import SweepFolder
from sweep.ledger.freezer import make_freezer
from sweep.ledger.limits import Limits
from sweep.ledger.steered_ledger import SteeredLedger
from sweep.plan.feasibility import UNPREDICTED
from sweep.prior.beginning import make_beginning
from sweep.space.parse import parse_space
from sweep.steering.command import parse_words
from sweep.steering.history import with_all_settings
from sweep.steering.inbox import send
from sweep.study.journal_file import JournalFile
from sweep.study.kept_commands import read_commands
from sweep.study.study import Study
from sweep.trials.record import GOING_ON, Outcome, Proposal
from tests.support import fake_engine as engine
from tests.support.reports import make_report

from .sweeps import config as sweep_config

NUM_RUNGS = 4
KILLED = 7
Trials = dict[int, tuple[dict[str, Any], str, list[float]]]
Script = Sequence[tuple[int, str]]


def settings(sampler: str, pruner: str, num_slots: int, num_trials: int = 7) -> dict[str, Any]:
    sampler_section = {"name": sampler, "num_startup_trials": 3} if sampler in ("tpe", "gp", "cmaes") else {"name": sampler}
    return sweep_config(
        Path("sweeps"), sampler=sampler_section, pruner={"name": pruner}, sweep={"num_trials": num_trials, "seed": 3},
        cluster={"max_concurrent": num_slots, "max_retries": 1}, optim={"eps": 1e-8},
    )  # fmt: skip


def run(path: Path, values: dict[str, Any], script: Script = ()) -> Trials:
    """Start the sweep in this folder, or continue it, and run it to its end.

    script: the user's commands, each with the number of reports after which it is sent.
    """
    folder = SweepFolder(path)
    config = with_all_settings(parse_sweep_config(values), read_commands(folder))
    space = parse_space(config.space)
    study, beginning = Study(folder, config, space), make_beginning(config, space, engine.SHAPE)
    study.beginning.keep(beginning.points(), beginning.rate)
    limits = Limits(
        num_trials=config.sweep.num_trials, num_rungs=NUM_RUNGS, num_slots=config.cluster.max_concurrent,
        max_retries=config.cluster.max_retries, budget=config.effective_budget, grid=config.train.report_grid(),
    )  # fmt: skip
    ledger = SteeredLedger(
        study, folder, limits, config=config, space=space, fit_check=lambda config: UNPREDICTED,
        freezer=make_freezer(config, space, study, limits),
    )  # fmt: skip
    ledger.recover()
    ledger.take_commands()
    live: list[Proposal] = []
    while ledger.has_work():
        _steer(ledger, folder, study, script)
        while isinstance(proposal := ledger.next_trial(), Proposal):
            live.append(proposal)
        live = [proposal for proposal in live if not _turn(ledger, folder, proposal)]
    return read(folder)


def read(folder: SweepFolder) -> Trials:
    """Read the sweep from its files alone: a result that is not in them is lost."""
    results = [json.loads(file.read_text()) for file in sorted(folder.path.glob("trials/*/result.json"))]
    return {
        result["number"]: (
            result["params"],
            result["outcome"],
            [report.eval_loss for report in folder.reports(result["number"])],
        )
        for result in results
    }


def _steer(ledger: SteeredLedger, folder: SweepFolder, study: Study, script: Script) -> None:
    """Send the commands that are due and were not sent before a kill, and let the ledger take them."""
    num_reports = sum(len(trial.intermediate_values) for trial in study._trials())
    known = {one.command.id for one in study.commands.taken}
    for place, (due, words) in enumerate(script):
        name = f"{place:020d}"
        if due <= num_reports and name not in known and not (folder.commands / f"{name}.json").exists():
            send(folder, parse_words(words.split(), "ann@box", 0.0, name))
            ledger.take_commands()


def _turn(ledger: SteeredLedger, folder: SweepFolder, proposal: Proposal) -> bool:
    """Train the trial to its next rung; return whether the trial has ended."""
    if (folder.trial(proposal.number) / LEAVE).exists():
        ledger.released(proposal.number)
        return True
    reports = read_reports(folder.trial(proposal.number))
    rung = len(reports) + 1
    loss = engine.eval_loss(proposal.config, rung) - _gained(proposal)
    report = make_report(rung, loss, tokens_seen=100 * rung, num_trainable=1)
    if reports and not checkpoint(folder, proposal.number).is_dir():
        raise AssertionError(f"trial {proposal.number} goes on without a checkpoint")
    checkpoint(folder, proposal.number).mkdir(parents=True, exist_ok=True)
    _export(folder.trial(proposal.number) / "adapter", loss)
    text = "".join(json.dumps(line.to_dict()) + "\n" for line in [*reports, report])
    write_text(folder.trial(proposal.number) / "reports.jsonl", text)
    if rung == NUM_RUNGS:
        ledger.ended(proposal.number, Outcome.COMPLETE, report)
        return True
    return ledger.reported(proposal.number, report)


def _export(adapter: Path, loss: float) -> None:
    """Write an adapter that tells its loss, without a write that a kill counts: an engine writes it in another process."""
    adapter.mkdir(exist_ok=True)
    for name in ADAPTER_FILES:
        (adapter / name).unlink(missing_ok=True)  # a clone may hold a link to it
        (adapter / name).write_text(json.dumps(loss))


def _gained(proposal: Proposal) -> float:
    """Return what a warm clone gains by its start, which must be the adapter that its config names."""
    lora = proposal.config.lora
    if lora.start_from is None:
        return 0.0
    refuse_other_start(lora)
    return 0.1 / json.loads((Path(lora.start_from) / ADAPTER_FILES[0]).read_text())


def checkpoint(folder: SweepFolder, number: int) -> Path:
    return folder.trial(number) / CHECKPOINT


def litter(folder: SweepFolder, trials: Trials) -> list[int]:
    """Return the trials that have ended and still have a checkpoint."""
    wait_until_flushed()
    ended = [number for number, (_, outcome, _) in trials.items() if outcome not in GOING_ON]
    return [number for number in ended if checkpoint(folder, number).exists()]


def killed_at(path: Path, values: dict[str, Any], write: int, how: str, script: Script = ()) -> bool:
    """Run in a forked process that ends silently at this write.

    Returns False if the sweep ended first. how: `before`, `after` or `torn` (half of a journal's
    line is on the disk).
    """
    pid = os.fork()
    if pid == 0:
        try:
            _die_at(write, how)
            run(path, values, script)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, KILLED), code
    return code == KILLED


def _die_at(write: int, how: str) -> None:
    """Count lasting writes: records appended to the journal, and files that replace others."""
    left = write

    def counted(original, tear=lambda *arguments: None):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0 and how != "after":
                if how == "torn":
                    tear(*arguments)
                os._exit(KILLED)
            result = original(*arguments, **options)
            if left == 0:
                os._exit(KILLED)
            return result

        return call

    # the kernel keeps what a killed process wrote; flushing is slow and only helps in power cuts
    os.fsync, os.replace, os.rename = lambda handle: None, counted(os.replace), counted(os.rename)
    JournalFile.append_logs = counted(JournalFile.append_logs, _half)


def _half(journal: JournalFile, logs: list[dict[str, Any]]) -> None:
    """Write the beginning of a record to the disk."""
    line = json.dumps(logs[0])
    journal._file.write(line[: len(line) // 2])
    journal._file.flush()
