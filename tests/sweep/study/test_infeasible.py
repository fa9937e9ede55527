"""What does not fit the card is refused before it starts, learned by the sampler, and never tried twice."""

from __future__ import annotations

import pytest

from engine.config.trial import TrainConfig
from sweep.config.sweep import parse_sweep_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.ledger import ledger
from sweep.ledger.ledger import Ledger, Next
from sweep.ledger.limits import Limits
from sweep.plan.feasibility import UNPREDICTED, Fit
from sweep.space.parse import parse_space
from sweep.study.samplers import as_seen
from sweep.study.study import Study
from sweep.trials.record import Outcome
from tests.support.fits import BASE
from tests.support.reports import make_report

RANKS = {"lora.rank": {"choices": [4, 8, 32, 64]}, "optim.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}


def config_for(space: dict, sampler: str = "random", num_trials: int = 6, seed: int = 0, **train):
    sections = {**BASE, "train": {**BASE["train"], **train}, "space": space, "sampler": {"name": sampler}}
    return parse_sweep_config({**sections, "pruner": {"name": "none"}, "sweep": {"num_trials": num_trials, "seed": seed}})


def by_rank(config: TrainConfig) -> Fit:
    """24 GiB; a trial needs as many as its rank times its micro-batch."""
    size = config.train.micro_batch_size
    need = float(config.lora.rank * (1 if size == "auto" else size))
    return Fit(None, f"needs {need} GiB" if need > 24 else None, need, need - 24)


def study_in(path, config, judge=by_rank) -> Study:
    return Study(SweepFolder(path), config, parse_space(config.space), judge)


def ledger_in(path, config, judge=by_rank) -> Ledger:
    return Ledger(
        study_in(path, config, judge), SweepFolder(path),
        Limits(num_trials=config.sweep.num_trials, num_rungs=4, num_slots=2, max_retries=1),
    )  # fmt: skip


def run(book: Ledger) -> list[int]:
    """Complete every trial the ledger hands out; returns their numbers."""
    started = []
    while (proposal := book.next_trial()) is not Next.FINISHED:
        if proposal is Next.WAIT:
            continue
        started.append(proposal.number)
        loss = 2.0 + proposal.config.optim.learning_rate
        book.ended(proposal.number, Outcome.COMPLETE, make_report(4, loss))
    return started


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "gp"])
def test_with_half_the_space_infeasible_every_trial_asked_for_runs(tmp_path, sampler):
    book = ledger_in(tmp_path, config_for(RANKS, sampler, num_trials=7))
    started = run(book)
    refused = [record for record in book.records if record.outcome is Outcome.INFEASIBLE]
    assert len(started) == 7 and refused and book.shortfall is None
    assert {record.number for record in refused}.isdisjoint(started)
    for record in refused:
        assert record.params["lora.rank"] > 24
        assert (record.error, record.predicted_peak_gib) == (f"needs {record.predicted_gib} GiB", record.params["lora.rank"])
        assert (SweepFolder(tmp_path).trial(record.number) / "result.json").is_file()


def test_a_finite_space_is_walked_to_its_end_and_its_infeasible_part_said(tmp_path):
    book = ledger_in(tmp_path, config_for({"lora.rank": {"choices": [4, 8, 32, 64]}}, "grid"))
    assert len(run(book)) == 2
    assert book.shortfall == "the space is used up: 2 of 6 trials were possible, 2 points do not fit the card"


def test_tpe_learns_to_keep_out_of_what_does_not_fit(tmp_path):
    space = {"lora.lora_dropout": {"low": 0.0, "high": 0.9}, "optim.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}

    def judge(config: TrainConfig) -> Fit:
        excess = config.lora.lora_dropout - 0.2
        return Fit(None, "too much" if excess > 0 else None, 1.0, excess)

    refused = {}
    for sampler in ("random", "tpe"):
        (tmp_path / sampler).mkdir()
        book = ledger_in(tmp_path / sampler, config_for(space, sampler, num_trials=16), judge)
        assert len(run(book)) == 16
        refused[sampler] = len(book.records) - 16
    assert refused["tpe"] < 0.7 * refused["random"], refused


def test_the_gaussian_process_sees_what_did_not_fit_as_the_worst_complete_trial(tmp_path):
    config = config_for(RANKS, "gp", num_trials=4)
    book = ledger_in(tmp_path, config)
    run(book)
    trials = book._study._trials()
    seen = as_seen(config.sampler, trials, 1)
    assert {trial.state.name for trial in seen} == {"COMPLETE"}
    assert all(len(trial.constraints) == 1 for trial in seen)
    refused = [trial.value for trial, known in zip(seen, trials) if known.state.name == "PRUNED"]
    assert set(refused) == {max(trial.value for trial in trials if trial.state.name == "COMPLETE")}


def test_a_resumed_sweep_neither_starts_nor_proposes_again_what_did_not_fit(tmp_path):
    space = {"lora.rank": {"choices": [4, 8, 32, 64]}, "lora.use_rslora": {"choices": [True, False]}}
    config = config_for(space, num_trials=4)
    before = ledger_in(tmp_path, config_for(space, num_trials=2))
    run(before)
    book = ledger_in(tmp_path, config)
    assert book.recover() == []
    assert [record.outcome for record in book.records] == [record.outcome for record in before.records]
    assert len(run(book)) == 2
    assert len({str(record.params) for record in book.records}) == len(book.records)


def test_where_nothing_is_found_that_fits_the_sweep_ends_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "MAX_INFEASIBLE_AT_ONCE", 7)
    book = ledger_in(tmp_path, config_for(RANKS, num_trials=2), lambda config: Fit(None, "too much", 99.0, 75.0))
    assert book.next_trial() is Next.WAIT
    assert len(book.records) == 7
    assert run(book) == []
    assert len(book.records) == 40 and not book.has_work()
    assert book.shortfall.startswith("0 of 2 trials were started: after 40 proposals that do not fit the card")


def test_points_that_differ_only_in_speed_are_one_trial(tmp_path):
    space = {"lora.rank": {"choices": [4, 8]}, "train.micro_batch_size": {"choices": [1, 2]}}
    book = ledger_in(tmp_path, config_for(space, "grid", tokens_per_step=4096))
    run(book)
    assert sorted(record.params["lora.rank"] for record in book.records) == [4, 8]
    assert "2 of 6 trials were possible" in book.shortfall


def test_a_micro_batch_that_does_not_fit_does_not_keep_a_smaller_one_out(tmp_path):
    space = {"lora.rank": {"choices": [8]}, "train.micro_batch_size": {"choices": [16, 8, 2]}}
    for seed in range(4):  # in whatever order
        (tmp_path / str(seed)).mkdir()
        book = ledger_in(tmp_path / str(seed), config_for(space, "grid", seed=seed, tokens_per_step=65536))
        run(book)
        complete = [record for record in book.records if record.outcome is Outcome.COMPLETE]
        assert [record.params["train.micro_batch_size"] for record in complete] == [2]


@pytest.mark.parametrize("verdict", [UNPREDICTED, Fit(None, None, 20.0, -3.0)], ids=["unpredicted", "predicted to fit"])
def test_memory_that_ran_out_is_recorded_with_both_peaks_and_violates_the_constraint(tmp_path, verdict):
    config = config_for(RANKS)
    study = study_in(tmp_path, config, lambda config: verdict)
    number = study.ask().number
    study.tell(number, Outcome.OUT_OF_MEMORY, "why", {"predicted_gib": 20.0, "measured_gib": 23.0})
    again = study_in(tmp_path, config)
    record = again.record(number)
    assert (record.outcome, record.error) == (Outcome.OUT_OF_MEMORY, "why")
    assert (record.predicted_peak_gib, record.peak_allocated_gib) == (20.0, 23.0)
    assert again._trials()[number].constraints["memory_gib"] > 0
    number = study.ask().number
    study.report(number, 1, 1.0)
    study.tell(number, Outcome.COMPLETE)
    assert all(excess <= 0 for excess in study._trials()[number].constraints.values())
