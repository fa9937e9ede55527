"""The study and the ledger, without Ray: proposals are new, rungs count once, pruning is told, a kill loses nothing."""

from __future__ import annotations

import json

import pytest

from engine.errors import InputError
from sweep.config.sweep import SweepConfig, parse_sweep_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.ledger.ledger import Ledger, Next
from sweep.ledger.limits import Limits
from sweep.space.parse import parse_space
from sweep.study.study import Study
from sweep.trials.record import Outcome

SMALL = {"lora.rank": {"choices": [2, 4, 8]}, "lora.use_rslora": {"choices": [True, False]}}
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
    path, config: SweepConfig, num_slots: int = 2, max_retries: int = 1, study: Study | None = None, **options
) -> Ledger:
    sweep = config.sweep
    limits = Limits(
        num_trials=sweep.num_trials, num_rungs=4, num_slots=num_slots, max_retries=max_retries, budget=sweep.budget,
        objectives=sweep.objectives,
    )  # fmt: skip
    return Ledger(study or study_in(path, config), SweepFolder(path), limits, **options)


def report(rung: int, loss: float) -> dict:
    return {"rung": rung, "eval_loss": loss, "tokens_seen": 100 * rung, "num_trainable": 1}


def write_reports(path, number: int, reports: list[dict]) -> None:
    (SweepFolder(path).trial(number) / "reports.jsonl").write_text("".join(json.dumps(line) + "\n" for line in reports))


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid", "cmaes"])
def test_a_small_space_is_walked_once_and_then_used_up(tmp_path, sampler):
    study = study_in(tmp_path, config_for(SMALL, sampler))
    proposals = []
    while (proposal := study.ask()) is not None:
        proposals.append(proposal)
        study.report(proposal.number, 1, 1.0 / proposal.config.lora.rank)
        study.tell(proposal.number, Outcome.COMPLETE)
    assert [proposal.number for proposal in proposals] == list(range(6))
    assert len({proposal.config.fingerprint() for proposal in proposals}) == 6
    assert len(study.records()) == 6


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "gp", "nsga2"])
@pytest.mark.parametrize("pruner", ["successive_halving", "hyperband", "median", "patient", "none"])
def test_samplers_and_pruners_work_together(tmp_path, sampler, pruner):
    study = study_in(tmp_path, config_for(WIDE, sampler, pruner))
    for _ in range(8):
        proposal = study.ask()
        outcome = Outcome.COMPLETE
        for rung in range(1, 5):
            study.report(proposal.number, rung, 2.0 + proposal.config.optim.learning_rate * 100 + 1 / rung)
            if rung < 4 and study.should_prune(proposal.number):
                outcome = Outcome.PRUNED
                break
        assert study.tell(proposal.number, outcome)
    records = study.records()
    assert len({json.dumps(record.config, sort_keys=True) for record in records}) == 8
    assert {record.outcome for record in records} <= {Outcome.COMPLETE, Outcome.PRUNED}


def test_the_same_seed_proposes_the_same_trials(tmp_path):
    first, second = (study_in(tmp_path / name, config_for(WIDE, "tpe")) for name in _folders(tmp_path))
    assert [first.ask().params for _ in range(4)] == [second.ask().params for _ in range(4)]


def test_a_reopened_study_does_not_propose_its_beginning_again(tmp_path):
    config = config_for(WIDE, "random")
    before = [study_in(tmp_path, config).ask().params for _ in range(3)]
    assert len({json.dumps(params) for params in before}) == 3


def test_a_sweep_read_back_from_its_folder_goes_on_in_the_same_space(tmp_path):
    """Choices written in sorted order were another distribution to Optuna, and the first new trial after a resume failed."""
    named = {"zeta": ["q_proj"], "alpha": ["k_proj"], "mid": "all-linear"}
    space = {**WIDE, "lora.target_modules": {"choices": named}, "data.max_seq_length": {"choices": [256, 128]}}
    config = config_for(space, sampler="tpe", num_trials=16)
    folder = SweepFolder(tmp_path)
    folder.write_config(config)
    study = study_in(tmp_path, config)
    for _ in range(6):  # past TPE's random start, whose trials it would compare
        study.tell(finish_one(study), Outcome.COMPLETE)
    again = study_in(tmp_path, folder.read_config())
    for _ in range(3):
        again.tell(finish_one(again), Outcome.COMPLETE)
    assert parse_space(folder.read_config().space).dimensions == parse_space(space).dimensions


def finish_one(study: Study) -> int:
    """Ask for a trial and report its only rung; returns its number."""
    proposal = study.ask()
    study.report(proposal.number, 1, 1.0 / proposal.config.lora.rank)
    return proposal.number


def test_successive_halving_stops_a_hopeless_trial_at_its_first_rung(tmp_path):
    ledger = ledger_in(tmp_path, config_for(WIDE))
    good, bad = ledger.next_trial(), ledger.next_trial()
    assert not ledger.reported(good.number, report(1, 2.0))
    assert ledger.reported(bad.number, report(1, 9.0))
    assert ledger.records[bad.number].outcome is Outcome.PRUNED
    result = json.loads((SweepFolder(tmp_path).trial(bad.number) / "result.json").read_text())
    assert result["outcome"] == "PRUNED"


def test_a_rung_reported_twice_counts_once(tmp_path):
    study = study_in(tmp_path, config_for(WIDE))
    number = study.ask().number
    assert study.report(number, 1, 2.0)
    assert not study.report(number, 1, 1.0)
    study.tell(number, Outcome.COMPLETE)
    assert not study.tell(number, Outcome.FAILED)
    assert study.record(number).outcome is Outcome.COMPLETE


def test_every_outcome_survives_a_reopening(tmp_path):
    config = config_for(WIDE, num_trials=6)
    study = study_in(tmp_path, config)
    outcomes = [Outcome.COMPLETE, Outcome.PRUNED, Outcome.OUT_OF_MEMORY, Outcome.DIVERGED, Outcome.LOST, Outcome.FAILED]
    for outcome in outcomes:
        number = study.ask().number
        study.report(number, 1, 2.0)
        study.tell(number, outcome, f"why {outcome}")
    records = study_in(tmp_path, config).records()
    assert [record.outcome for record in records] == outcomes
    assert records[2].error == "why OUT_OF_MEMORY"


def test_the_ledger_fills_its_slots_and_finishes_when_nothing_runs(tmp_path):
    ledger = ledger_in(tmp_path, config_for(WIDE, pruner="none", num_trials=3))
    first, second = ledger.next_trial(), ledger.next_trial()
    assert ledger.next_trial() is Next.WAIT
    ledger.ended(first.number, Outcome.COMPLETE, report(1, 2.0))
    third = ledger.next_trial()
    ledger.ended(second.number, Outcome.FAILED, error="why")
    assert ledger.next_trial() is Next.WAIT
    ledger.ended(third.number, Outcome.COMPLETE, report(1, 3.0))
    assert ledger.next_trial() is Next.FINISHED
    assert [record.outcome for record in ledger.records] == [Outcome.COMPLETE, Outcome.FAILED, Outcome.COMPLETE]


def test_a_trial_whose_process_dies_goes_on_with_its_number_and_is_lost_in_the_end(tmp_path):
    ledger = ledger_in(tmp_path, config_for(WIDE, num_trials=1), max_retries=1)
    first = ledger.next_trial()
    ledger.lost(first.number)
    again = ledger.next_trial()
    assert (again.number, again.config) == (first.number, first.config)
    ledger.lost(first.number)
    assert ledger.next_trial() is Next.FINISHED
    assert ledger.records[0].outcome is Outcome.LOST


def test_after_a_kill_unheard_reports_are_reported_and_finished_trials_told(tmp_path):
    config = config_for(WIDE, pruner="none", num_trials=4)
    ledger = ledger_in(tmp_path, config, num_slots=3)
    running, finished, unheard = (ledger.next_trial() for _ in range(3))
    ledger.reported(finished.number, report(1, 3.0))
    write_reports(tmp_path, finished.number, [report(rung, 3.0 - rung / 10) for rung in range(1, 5)])
    write_reports(tmp_path, unheard.number, [report(1, 4.0)])

    resumed = ledger_in(tmp_path, config, num_slots=3)
    assert resumed.recover() == [running.number, unheard.number]
    assert resumed.records[finished.number].outcome is Outcome.COMPLETE
    assert resumed.records[finished.number].score == pytest.approx(2.6)
    assert [resumed.next_trial().number for _ in range(3)] == [running.number, unheard.number, 3]


def test_a_torn_line_and_a_stale_lock_in_the_journal_are_mended(tmp_path):
    config = config_for(WIDE)
    study_in(tmp_path, config).ask()
    journal = SweepFolder(tmp_path).journal
    with open(journal, "ab") as file:
        file.write(b'{"op_code": 4, "wor')
    journal.with_name("study.journal.lock").symlink_to(journal)
    study = study_in(tmp_path, config)
    study.ask()
    assert len(study_in(tmp_path, config).records()) == 2


def test_grid_refuses_a_continuous_space():
    with pytest.raises(InputError, match=r"optim\.learning_rate"):
        parse_space(WIDE).check_walkable()


def _folders(path) -> list[str]:
    for name in ("a", "b"):
        (path / name).mkdir()
    return ["a", "b"]
