"""What does not fit the card: refused before it starts, recorded with its reason, learned by the sampler, never tried twice."""

from __future__ import annotations

import pytest

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.errors import InputError, OutOfMemory
from engine.planning.model_shape import ModelShape
from engine.planning.planner import ComputePlan
from sweep.config.sweep import parse_sweep_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.ledger import ledger
from sweep.ledger.ledger import Ledger, Next
from sweep.ledger.limits import Limits
from sweep.plan import feasibility
from sweep.plan.feasibility import UNPREDICTED, Feasibility, Fit, make_feasibility
from sweep.plan.forecast import check_any_fits, corners
from sweep.space.parse import parse_space
from sweep.study.samplers import as_seen
from sweep.study.study import Study
from sweep.trials.record import Outcome

SHAPE = {"num_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
         "vocab_size": 256}  # fmt: skip
BASE = {"model": {"path": "m"}, "data": {"train": "t"}, "train": {"max_tokens": 400, "num_reports": 4}}
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
        book.ended(proposal.number, Outcome.COMPLETE, {"rung": 4, "eval_loss": loss, "tokens_seen": 400})
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


# --- the judge ---


def config_with(**sections) -> TrainConfig:
    return parse(TrainConfig, {**BASE, **sections})


@pytest.fixture
def planned(monkeypatch) -> list[TrainConfig]:
    """A planner that needs 1 GiB per rank; returns what it was asked."""
    asked = []

    def plan(config, shape, card, host_gib):
        asked.append(config)
        if config.lora.lora_dropout > host_gib:
            raise OutOfMemory("needs more on the host")
        if config.lora.rank > card.memory_gib:
            raise OutOfMemory("needs more", float(config.lora.rank))
        memory = type("Memory", (), {"peak_gib": float(config.lora.rank), "reserve_gib": 0.5})
        return ComputePlan(2, True, 0, 0, 0.0, memory=memory)

    monkeypatch.setattr(feasibility, "make_compute_plan", plan)
    return asked


def test_a_verdict_says_whether_why_and_by_how_much(planned):
    judge = make_feasibility("rtx4090", {"shape": SHAPE, "card": None}).check_fit
    fits, too_large = judge(config_with(lora={"rank": 8})), judge(config_with(lora={"rank": 64}))
    assert fits.fits and fits.plan.micro_batch_size == 2 and fits.predicted_peak_gib == 8.0 and fits.excess_gib < 0
    assert not too_large.fits and (too_large.reason, too_large.predicted_peak_gib) == ("needs more", 64.0)
    assert too_large.excess_gib == pytest.approx(64.0 - 23.6)


def test_what_changes_neither_memory_nor_speed_is_planned_once(planned):
    judge = make_feasibility("rtx4090", {"shape": SHAPE}).check_fit
    for rate in (1e-4, 2e-4):
        judge(config_with(optim={"learning_rate": rate}, lora={"lora_alpha": rate}))
    assert len(planned) == 1
    for size in (1, 2):
        judge(config_with(train={**BASE["train"], "micro_batch_size": size}))
    assert len(planned) == 3


def test_nothing_is_predicted_without_a_card_without_a_shape_or_on_a_cpu(planned):
    config = config_with(lora={"rank": 4096})
    assert Feasibility(ModelShape(**SHAPE), None).check_fit(config) is UNPREDICTED
    assert make_feasibility("rtx4090", {"shape": None}).check_fit(config) is UNPREDICTED
    on_cpu = config_with(lora={"rank": 4096}, train={**BASE["train"], "device": "cpu"})
    assert make_feasibility("rtx4090", {"shape": SHAPE}).check_fit(on_cpu) is UNPREDICTED
    assert UNPREDICTED.fits and planned == []


def test_auto_means_the_card_found_with_the_memory_it_has(planned):
    found = {"name": "Some Card 9000", "memory_gib": 12.5}
    assert make_feasibility("auto", {"shape": SHAPE, "card": found}).card.memory_gib == 12.5
    assert make_feasibility("auto", {"shape": SHAPE, "card": None}).card is None
    assert make_feasibility("a10g", {"shape": SHAPE, "card": found}).card.name == "a10g"


def test_the_host_memory_of_a_machine_counts_where_it_has_a_gpu(planned):
    found = {"name": "Some Card 9000", "memory_gib": 12.5}
    config = config_with(lora={"rank": 4, "lora_dropout": 0.5})
    verdict = make_feasibility("auto", {"shape": SHAPE, "card": found, "host_gib": 0.25}).check_fit(config)
    assert (verdict.reason, verdict.predicted_peak_gib) == ("needs more on the host", None) and verdict.excess_gib > 0
    assert make_feasibility("rtx4090", {"shape": SHAPE, "card": None, "host_gib": 0.25}).check_fit(config).fits


# --- the whole space ---


def test_corners_are_points_of_the_space_and_conditions_hold():
    targets = {"choices": {"attention": ["q_proj"], "all": "all-linear"}}
    rank = {"choices": [4, 16, 8], "when": {"lora.target_modules": "all"}}
    length = {"low": 256, "high": 1024, "log": True}
    rate = {"low": 1e-4, "high": 1e-2, "log": True}
    space = parse_space({
        "lora.target_modules": targets, "lora.rank": rank, "data.max_seq_length": length, "optim.learning_rate": rate,
    })  # fmt: skip
    points = corners(space)
    low = {"lora.target_modules": "attention", "data.max_seq_length": 256, "optim.learning_rate": 1e-4}
    assert points[0] == low
    assert points[-1] == {
        "lora.target_modules": "all", "lora.rank": 16, "data.max_seq_length": 1024, "optim.learning_rate": 1e-2,
    }  # fmt: skip
    assert {**low, "data.max_seq_length": 1024} in points
    assert all(("lora.rank" in point) == (point["lora.target_modules"] == "all") for point in points)
    assert len(corners(parse_space({"lora.rank": {"choices": list(range(1, 90))}}))) == 24


@pytest.mark.parametrize("length", [{"choices": [512, 1024]}, {"low": 512, "high": 1024}])
def test_a_space_is_refused_only_where_its_least_demanding_point_does_not_fit(planned, length):
    """Also where every change of the base alone does not fit."""
    judge = make_feasibility("rtx4090", {"shape": SHAPE})
    base = config_with(lora={"rank": 4096}).model_dump(mode="json")
    wide = parse_space({"lora.rank": {"choices": [64, 8]}, "data.max_seq_length": length})
    check_any_fits(wide, base, judge)
    narrow = parse_space({"lora.rank": {"choices": [64, 32]}, "data.max_seq_length": length})
    with pytest.raises(InputError, match=r"space = 'rank=32 max_seq_length=512': .*rtx4090 \(23\.6 GiB\).* needs more"):
        check_any_fits(narrow, base, judge)
    check_any_fits(narrow, base, make_feasibility("auto", {"shape": SHAPE}))
