"""The study proposes new points, counts a rung once, and loses nothing in a kill (no Ray)."""

from __future__ import annotations

import json

import pytest

from engine.errors import InputError
from sweep.folder.sweep_folder import SweepFolder
from sweep.space.parse import parse_space
from sweep.trials.record import Outcome
from tests.support.studies import SMALL, WIDE, config_for, finish_one, ledger_in, report, study_in


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
    """Choices written in sorted order were another distribution to Optuna.

    The first new trial after a resume then failed.
    """
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
