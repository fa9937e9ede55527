"""Trials pause at rungs and go on later, and a budget in full trials ends the sweep."""

from __future__ import annotations

import json

import optuna
import pytest

from engine.errors import InputError
from sweep.config.sweep import parse_sweep_config
from sweep.curves.situation import GoOn, Situation, Stand, StartNew
from sweep.folder.sweep_folder import SweepFolder
from sweep.ledger.answers import Next
from sweep.ledger.freezer import make_freezer
from sweep.ledger.ledger import Ledger
from sweep.plan.feasibility import Fit
from sweep.space.parse import parse_space
from sweep.study.earlier_sweeps import read_earlier
from sweep.study.journal import STUDY_NAME, open_journal
from sweep.study.study import Study
from sweep.trials.record import Outcome
from sweep.trials.selection import Rule
from tests.support.best_first import BestFirst
from tests.support.fake_sweeps import fake_driver, results, rungs, start, sweep_folder
from tests.support.records import trial
from tests.support.studies import SMALL, WIDE, config_for, ledger_in, report, study_in, write_reports


class Script:
    """A policy that decides what the test says, and then nothing."""

    def __init__(self, *decisions) -> None:
        self.left, self.seen = list(decisions), []

    def decide(self, situation: Situation):
        stands = {number: curve.stand for number, curve in situation.trials.items()}
        self.seen.append((stands, situation.tokens_left, len(situation.candidates)))
        found = self.left[0] if self.left else None
        return StartNew(situation.candidates[0]) if found == "new" and situation.candidates else None if found == "new" else found


@pytest.fixture
def policy(monkeypatch):
    script = Script()
    monkeypatch.setattr("sweep.ledger.freezer.make_policy", lambda *arguments: script)
    return script


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr("sweep.ledger.freezer.make_policy", lambda config, space, base, grid, *rest: BestFirst(grid))


def open_ledger(path, num_slots: int = 1, space: dict = WIDE, num_trials: int = 8, **budget) -> Ledger:
    path.mkdir(exist_ok=True)
    ledger = ledger_in(path, config_for(space, "freeze_thaw", num_trials=num_trials, budget=budget), num_slots)
    ledger.recover()
    return ledger


def say(ledger: Ledger, path, number: int, rung: int, loss: float = 2.0) -> bool:
    """Act as an engine at a rung; returns whether the trial gives up its slot."""
    write_reports(path, number, [report(earlier, loss) for earlier in range(1, rung + 1)])
    if rung < 4:
        return ledger.reported(number, report(rung, loss))
    ledger.ended(number, Outcome.COMPLETE, report(rung, loss))
    return True


def outcomes(ledger: Ledger) -> list[str]:
    return [str(record.outcome) for record in ledger.records]


def result(path, number: int) -> dict | None:
    file = SweepFolder(path).trial(number) / "result.json"
    return json.loads(file.read_text()) if file.is_file() else None


def test_a_trial_that_is_not_named_pauses_and_goes_on_later_with_its_reports(tmp_path, policy):
    ledger = open_ledger(tmp_path)
    policy.left = ["new"]
    first = ledger.next_trial().number
    assert say(ledger, tmp_path, first, 1)
    assert outcomes(ledger) == ["PAUSED"] and first not in ledger.live
    assert (result(tmp_path, first)["outcome"], result(tmp_path, first)["num_reports"]) == ("PAUSED", 1)
    second = ledger.next_trial().number
    policy.left = [GoOn(second)]
    assert not say(ledger, tmp_path, second, 1) and outcomes(ledger) == ["PAUSED", "RUNNING"]
    policy.left = [GoOn(first)]
    assert say(ledger, tmp_path, second, 2)
    again = ledger.next_trial()
    assert (again.number, again.num_heard) == (first, 1) and outcomes(ledger) == ["RUNNING", "PAUSED"]
    assert result(tmp_path, first) is None  # no result while it runs
    assert not say(ledger, tmp_path, first, 2)
    assert [one.rung for one in ledger.records[first].reports] == [1, 2]


def test_the_policy_sees_who_runs_and_what_their_next_rungs_cost(tmp_path, policy):
    ledger = open_ledger(tmp_path, num_slots=2, full_trials=2.0)
    policy.left = ["new"]
    first, second = ledger.next_trial().number, ledger.next_trial().number
    assert [tokens for _, tokens, _ in policy.seen] == [800, 700]
    policy.left = [GoOn(second)]
    assert not say(ledger, tmp_path, second, 1)
    stands, tokens_left, _ = policy.seen[-1]
    assert stands == {first: Stand.RUNNING, second: Stand.FREE} and tokens_left == 600
    policy.left = []
    assert say(ledger, tmp_path, first, 1) and policy.seen[-1][1] == 500


def test_one_decision_is_made_for_a_pause_and_the_slot_that_it_frees(tmp_path, policy):
    ledger = open_ledger(tmp_path)
    policy.left = ["new"]
    number = ledger.next_trial().number
    assert say(ledger, tmp_path, number, 1)
    num_asked = len(policy.seen)
    ledger.next_trial()
    assert len(policy.seen) == num_asked


def test_to_optuna_a_paused_trial_runs_so_that_its_tools_open_the_journal(tmp_path, policy):
    ledger = open_ledger(tmp_path)
    policy.left = ["new"]
    assert say(ledger, tmp_path, ledger.next_trial().number, 1)
    (paused,) = optuna.load_study(study_name=STUDY_NAME, storage=open_journal(SweepFolder(tmp_path))).trials
    assert paused.state is optuna.trial.TrialState.RUNNING and paused.user_attrs["outcome"] == "PAUSED"
    assert paused.intermediate_values == {1: 2.0}


def test_a_resume_continues_a_paused_trial_only_if_the_policy_says_so(tmp_path, policy):
    ledger = open_ledger(tmp_path)
    policy.left = ["new"]
    number = ledger.next_trial().number
    assert say(ledger, tmp_path, number, 1)
    policy.left = []
    resumed = ledger_in(tmp_path, config_for(WIDE, "freeze_thaw"), 1)
    assert resumed.recover() == [] and not resumed.has_work() and outcomes(resumed) == ["PAUSED"]
    policy.left = [GoOn(number)]
    willing = ledger_in(tmp_path, config_for(WIDE, "freeze_thaw"), 1)
    assert willing.recover() == [] and willing.has_work() and willing.next_trial().number == number


def test_the_sweep_ends_once_the_policy_wants_nothing_and_says_what_is_left(tmp_path, policy):
    ledger = open_ledger(tmp_path, num_slots=2)
    policy.left = ["new"]
    first, second = ledger.next_trial().number, ledger.next_trial().number
    policy.left = []
    assert say(ledger, tmp_path, first, 1)
    assert ledger.next_trial() is Next.WAIT  # the other one may change its mind
    assert say(ledger, tmp_path, second, 1)
    assert ledger.next_trial() is Next.FINISHED and not ledger.has_work()
    assert "too little for another rung" in ledger.shortfall and "2 of 8 trials were started, 2 paused" in ledger.shortfall


def test_a_spent_budget_stops_who_runs_and_a_larger_one_lets_the_policy_choose(tmp_path, policy):
    ledger = open_ledger(tmp_path, num_slots=2, full_trials=0.5)
    policy.left = ["new"]
    first, second = ledger.next_trial().number, ledger.next_trial().number
    assert say(ledger, tmp_path, first, 1) and say(ledger, tmp_path, second, 1)
    assert ledger.next_trial() is Next.FINISHED and outcomes(ledger) == ["PAUSED", "STOPPED"]
    assert "sweep.budget.full_trials = 0.5 is spent (200 tokens" in ledger.shortfall
    assert "1 stopped at a report, 1 paused" in ledger.shortfall
    policy.left = [GoOn(first)]
    more = open_ledger(tmp_path, full_trials=1.0)
    assert outcomes(more) == ["PAUSED", "PAUSED"] and more.next_trial().number == first


def test_the_default_budget_is_a_quarter_of_the_trials_and_at_least_two_if_there_are_two():
    budgets = [config_for(WIDE, "freeze_thaw", num_trials=count).effective_budget.full_trials for count in (1, 2, 8, 30)]
    assert budgets == [1.0, 2.0, 2.0, 7.5]
    tokens = [config_for(WIDE, name, num_trials=30).most_tokens for name in ("freeze_thaw", "tpe")]
    assert tokens == [7.5 * 400, 30 * 400]
    assert config_for(WIDE, "tpe", num_trials=3, budget={"full_trials": 4.0}).most_tokens == 3 * 400
    assert config_for(WIDE, "freeze_thaw", budget={"full_trials": 0.5}).effective_budget.full_trials == 0.5
    assert config_for(WIDE, "tpe").effective_budget.full_trials is None


def test_a_budget_of_full_trials_ends_a_sweep_with_any_sampler(tmp_path):
    config = config_for(WIDE, "random", "none", budget={"full_trials": 1.5})
    ledger = ledger_in(tmp_path, config, 1)
    first = ledger.next_trial().number
    for rung in (1, 2, 3, 4):
        say(ledger, tmp_path, first, rung)
    second = ledger.next_trial().number
    assert not say(ledger, tmp_path, second, 1)
    resumed = ledger_in(tmp_path, config, 1)
    assert resumed.recover() == [second]
    assert resumed.next_trial().number == second and say(resumed, tmp_path, second, 2)
    assert resumed.next_trial() is Next.FINISHED and outcomes(resumed) == ["COMPLETE", "STOPPED"]


def test_equal_configs_and_points_that_do_not_fit_are_never_trained(tmp_path, plain):
    space = {"lora.rank": {"choices": [2, 4, 8]}, "train.activation_checkpointing": {"choices": [True, False]}}
    config = config_for(space, "freeze_thaw", num_trials=10, budget={"full_trials": 100.0})
    study = Study(
        SweepFolder(tmp_path), config, parse_space(space),
        lambda config: Fit(None, "too large", 9.0, 1.0) if config.lora.rank == 8 else Fit(),
    )  # fmt: skip
    ledger = ledger_in(tmp_path, config, 1, study=study)
    ledger.recover()
    while not isinstance(proposal := ledger.next_trial(), Next):
        number = proposal.number
        rung = len(SweepFolder(tmp_path).reports(number)) + 1
        while not say(ledger, tmp_path, number, rung, 2.0 + number - rung / 8):
            rung += 1
    records = ledger.records
    assert sorted(r.params["lora.rank"] for r in records if r.outcome is Outcome.COMPLETE) == [2, 4]
    assert {r.params["lora.rank"] for r in records if r.outcome is Outcome.INFEASIBLE} == {8}
    assert "the space is used up" in ledger.shortfall


def test_an_earlier_sweeps_paused_trial_tells_its_losses_and_costs_nothing(tmp_path, policy):
    old = open_ledger(tmp_path / "old")
    policy.left = ["new"]
    assert say(old, tmp_path / "old", old.next_trial().number, 1)
    (tmp_path / "new").mkdir()
    config, folder = config_for(WIDE, "freeze_thaw", warm_start=[str(tmp_path / "old")]), SweepFolder(tmp_path / "old")
    folder.write_config(config_for(WIDE, "freeze_thaw"))
    study = study_in(tmp_path / "new", config)
    study.take_over(read_earlier(config, parse_space(WIDE), {}))
    ledger = ledger_in(tmp_path / "new", config, 1, study=study)
    assert ledger.recover() == [] and outcomes(ledger) == ["PAUSED"]
    assert ledger.next_trial().number == 1 and policy.seen[-1][:2] == ({0: Stand.OVER}, 800)
    assert Rule().best(ledger.records) is None  # its adapter lies elsewhere


def test_a_paused_trial_with_the_lowest_loss_wins():
    records = [trial(0, 1.2), trial(1, 1.0, outcome=Outcome.PAUSED), trial(2, 0.5, outcome=Outcome.PRUNED)]
    assert Rule().best(records) is records[1] and Rule().rank(records) == [records[1], records[0], records[2]]


def test_several_objectives_are_refused_in_one_line_and_a_pruner_is_off():
    with pytest.raises(InputError, match=r"sampler.name = 'freeze_thaw': takes one objective"):
        config_for(WIDE, "freeze_thaw", objectives=["eval_loss", "elapsed_s"])
    assert config_for(WIDE, "freeze_thaw", "median").effective_pruner.name == "none"
    assert make_freezer(config_for(SMALL, "tpe"), parse_space(SMALL), None, None) is None
    assert parse_sweep_config(config_for(WIDE, "freeze_thaw").model_dump(mode="json")).sampler.name == "freeze_thaw"


@pytest.mark.faults
def test_a_whole_sweep_pauses_and_continues_trials_under_ray_and_a_resume_spends_more(tmp_path):
    space = {"lora.rank": {"choices": [2, 4, 8, 16]}, "optim.learning_rate": {"low": 1e-4, "high": 1.1e-2, "log": True}}
    process = start(
        tmp_path, optim={"eps": 0.05}, space=space, sweep={"num_trials": 12}, sampler={"name": "freeze_thaw"}
    )
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    folder = sweep_folder(tmp_path)
    ended = {number: one["outcome"] for number, one in results(folder).items()}
    assert set(ended.values()) <= {"COMPLETE", "PAUSED", "STOPPED"} and "PAUSED" in ended.values()
    assert all(rungs(folder, number) == list(range(1, len(rungs(folder, number)) + 1)) for number in ended)
    assert 12 <= sum(len(rungs(folder, number)) for number in ended) <= 13  # three full trials of four rungs, two slots
    assert "goes on after rung" in out and (folder / "best" / "adapter_model.safetensors").is_file()
    starts = [len((folder / "trials" / f"{n:04d}" / "starts.txt").read_text().splitlines()) for n in ended]
    assert max(starts) > 1 and max(starts) <= 4  # a trial that went on was started from its checkpoint
    assert "PAUSED" in (folder / "report.html").read_text()

    resumed = fake_driver("resume", str(folder), json.dumps({"sweep.budget.full_trials": 5}))
    out, err = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, err
    assert 20 <= sum(len(rungs(folder, number)) for number in results(folder)) <= 21


def test_a_whole_sweep_of_the_plain_policy_spends_its_tokens_and_finishes_a_trial(tmp_path, plain):
    ledger = open_ledger(tmp_path, num_trials=16)
    while ledger.has_work():
        proposal = ledger.next_trial()
        rung = proposal.num_heard + 1
        while not say(ledger, tmp_path, proposal.number, rung, 3.0 + proposal.number % 5 - rung / 8):
            rung += 1
    rungs = [len(record.reports) for record in ledger.records]
    assert sum(rungs) == 16 and max(rungs) == 4 and outcomes(ledger).count("COMPLETE") >= 1
    assert ledger.shortfall.startswith("sweep.budget.full_trials = 4 is spent (1,600 tokens in all trials)")
