"""The best two trials are trained again with other seeds, and every place says what a seed changes."""

from __future__ import annotations

import json
import signal
import time

import pytest

from engine.errors import InputError
from sweep.config.sweep import parse_sweep_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.folder.timeline import spent_on_finals
from sweep.ledger.ledger import Ledger, Next
from sweep.ledger.limits import Limits
from sweep.plan.feasibility import UNPREDICTED
from sweep.plan.sweep_plan import make_sweep_plan
from sweep.results.final_seeds import SeedLosses, finalists, pooled_deviation, read_final_seeds
from sweep.results.finals_ledger import FinalsLedger
from sweep.results.verdict import judge, read_verdict
from sweep.trials.record import Outcome
from sweep.trials.selection import Rule
from tests.support.fake_sweeps import fake_driver, start, sweep_folder
from tests.support.records import trial
from tests.support.studies import WIDE, report, study_in, write_reports

SPACE = {**WIDE, "data.max_seq_length": {"choices": {"short": 64, "long": 128}, "when": {"lora.use_rslora": True}}}


class Sweep:
    """A sweep whose search and finals are driven by hand, session after session."""

    def __init__(self, path, seed: int = 0, **section) -> None:
        values = {
            "model": {"path": "m"}, "data": {"train": "t", "max_seq_length": 64}, "space": SPACE, "sampler": {"name": "tpe"},
            "train": {"max_tokens": 400, "num_reports": 4, "seed": seed}, "cluster": {"num_cpu_slots": 2},
            "sweep": {"num_trials": 4, "final_seeds": 2, **section},
        }  # fmt: skip
        self.path, self.values, self.said, self.tracked, self.now_s = path, values, [], [], 1000.0
        path.mkdir(exist_ok=True)

    def search(self) -> Ledger:
        """Open the sweep's own ledger, as a session does."""
        self.plan, folder = make_sweep_plan(parse_sweep_config(self.values)), SweepFolder(self.path)
        folder.write_config(self.plan.config)
        limits = Limits.of(self.plan, elsewhere_s=spent_on_finals(folder))
        ledger = Ledger(study_in(self.path, self.plan.config), folder, limits, clock=lambda: self.now_s)
        ledger.recover()
        return ledger

    def finals(self, search: Ledger) -> Ledger | None:
        fit_check, said = (lambda config: UNPREDICTED), self.said.append
        return FinalsLedger(self.plan, SweepFolder(self.path), fit_check, {}, said, self._track).open(search)

    def _track(self, record, number: int) -> None:
        self.tracked.append((number, record.params["train.seed"], record.outcome))

    def train(self, ledger: Ledger, path, loss_of, most: int = 99) -> list[dict]:
        """Train up to so many trials to their ends; return their params."""
        seen = []
        while len(seen) < most and not isinstance(proposal := ledger.next_trial(), Next):
            self.now_s += 100.0
            loss = loss_of(proposal)
            write_reports(path, proposal.number, [report(rung, loss) for rung in range(1, 5)])
            ledger.ended(proposal.number, Outcome.COMPLETE, report(4, loss))
            seen.append(proposal.params)
        return seen

    def searched(self) -> Ledger:
        """Return the ledger after a search in which trial 2 is the best and trial 1 the next."""
        ledger = self.search()
        self.train(ledger, self.path, lambda proposal: {1: 2.1, 2: 2.0}.get(proposal.number, 3.0))
        return ledger

    @property
    def own(self):
        return SweepFolder(self.path).final_seeds


def test_the_best_two_are_trained_again_each_with_another_seed_and_the_spread_is_said(tmp_path):
    sweep = Sweep(tmp_path / "s", seed=7)
    search = sweep.searched()
    second, best = search.records[1], search.records[2]
    finals = sweep.finals(search)
    assert sweep.train(finals, sweep.own, lambda proposal: 2.2) == [
        {**best.params, "train.seed": 8}, {**second.params, "train.seed": 8}]  # fmt: skip
    assert not finals.has_work() and sweep.finals(search) is None
    found = read_final_seeds(SweepFolder(sweep.path), search.records)
    assert [(one.trial, one.seeds, one.losses) for one in found] == [(2, (7, 8), (2.0, 2.2)), (1, (7, 8), (2.1, 2.2))]
    line = "With other seeds, trial 2: 2.0000 (seed 7), 2.2000 (seed 8), mean 2.1000; trial 1: 2.1000 (seed 7), "
    verdict = read_verdict(SweepFolder(sweep.path), search.records, Rule())
    assert verdict.seeds_line.startswith(line) and verdict.seeds_line in verdict.lines
    assert verdict.summary()["seed_deviation"] == pytest.approx(0.1118, abs=1e-4) and verdict.best.number == 2
    assert sweep.said[0] == "final seeds  training trial 2 and trial 1 again with other seeds"
    assert sweep.said[-1] == "final seeds  trial 1 with seed 8  COMPLETE  eval loss 2.2000"


def test_the_tracker_hears_of_each_and_of_all_again_in_a_resume(tmp_path):
    sweep = Sweep(tmp_path / "s")
    search = sweep.searched()
    sweep.train(sweep.finals(search), sweep.own, lambda proposal: 2.2)
    ends = [(2, 1, Outcome.COMPLETE), (1, 1, Outcome.COMPLETE)]
    assert [one for one in sweep.tracked if one[2] is Outcome.COMPLETE] == ends
    sweep.tracked.clear()
    assert sweep.finals(search) is None and sweep.tracked == ends  # MLflow may have been away


def test_their_config_differs_from_the_first_in_the_seed_alone(tmp_path):
    sweep = Sweep(tmp_path / "s")
    search = sweep.searched()
    proposal = sweep.finals(search).next_trial()
    ours, first = proposal.config.model_dump(mode="json"), search.records[2].config
    assert ours["train"].pop("seed") == 1 and first["train"].pop("seed") == 0 and ours == first


def test_after_a_kill_the_same_trials_go_on_and_none_is_trained_twice(tmp_path):
    sweep = Sweep(tmp_path / "s", final_seeds=3)
    search = sweep.searched()
    finals = sweep.finals(search)
    done = sweep.train(finals, sweep.own, lambda proposal: 2.2, most=1)
    running = finals.next_trial()  # and here the driver is killed
    write_reports(sweep.own, running.number, [report(1, 2.5)])
    again = sweep.finals(sweep.search())
    continued = again.next_trial()
    assert (continued.number, continued.params, continued.num_heard) == (running.number, running.params, 1)
    again.ended(continued.number, Outcome.COMPLETE, report(2, 2.4))
    rest = sweep.train(again, sweep.own, lambda proposal: 2.2)
    assert [params["train.seed"] for params in (*done, running.params, *rest)] == [1, 1, 2, 2]
    assert len({json.dumps(params) for params in (*done, running.params, *rest)}) == 4
    assert sweep.finals(sweep.search()) is None


def test_the_search_goes_on_as_if_there_had_been_none_of_it_and_new_finalists_follow(tmp_path):
    with_finals, without = Sweep(tmp_path / "a"), Sweep(tmp_path / "b", final_seeds=0)
    assert without.finals(without.searched()) is None and not without.own.exists()
    with_finals.train(with_finals.finals(with_finals.searched()), with_finals.own, lambda proposal: 0.5)
    for sweep in (with_finals, without):
        sweep.values["sweep"]["num_trials"] = 6
    searches = [sweep.search() for sweep in (with_finals, without)]
    proposed = [sweep.train(ledger, sweep.path, lambda proposal: 1.0 + proposal.number / 10)
                for sweep, ledger in zip((with_finals, without), searches, strict=True)]  # fmt: skip
    assert proposed[0] == proposed[1] and len(proposed[0]) == 2
    trained = with_finals.train(with_finals.finals(searches[0]), with_finals.own, lambda proposal: 2.0)
    assert [{**params, "train.seed": 1} for params in proposed[0]] == trained
    assert [one.trial for one in read_final_seeds(SweepFolder(with_finals.path), searches[0].records)] == [4, 5, 2, 1]


def test_the_hours_of_search_and_finals_count_against_one_budget(tmp_path):
    sweep = Sweep(tmp_path / "s", budget={"gpu_hours": 550 / 3600, "target_loss": 1.0}, final_seeds=3)
    finals = sweep.finals(sweep.searched())  # 400 s
    assert len(sweep.train(finals, sweep.own, lambda proposal: 0.9)) == 2  # 200 s, over 550; a good loss ends nothing
    assert "is spent" in finals.shortfall and "2 of 4 trials" in finals.shortfall
    assert spent_on_finals(SweepFolder(sweep.path)) == (200.0, 200.0)
    sweep.values["sweep"] |= {"num_trials": 8, "final_seeds": 0}
    search = sweep.search()
    assert search.next_trial() is Next.FINISHED and "is spent" in search.shortfall
    sweep.values["sweep"]["budget"] = {"gpu_hours": 1.0}  # the twin
    assert not isinstance(sweep.search().next_trial(), Next)


def test_the_finalists_are_the_winner_and_the_lowest_other_that_ran_to_its_end():
    records = [trial(0, 1.0, outcome=Outcome.STOPPED), trial(1, 1.2), trial(2, 1.10005, num_trainable=300), trial(3, 1.1001)]
    assert [record.number for record in finalists(Rule(), records)] == [3, 2]
    assert finalists(Rule(), records[:1]) == []


@pytest.mark.parametrize("has_other", [True, False])
def test_a_winner_that_waits_is_no_finalist_and_the_user_is_told(tmp_path, has_other):
    sweep = Sweep(tmp_path / "s", num_trials=2, budget={"full_trials": 1.25 if has_other else 0.25})
    search = sweep.search()
    if has_other:
        sweep.train(search, sweep.path, lambda proposal: 2.0, most=1)
    number = search.next_trial().number
    write_reports(sweep.path, number, [report(1, 1.5)])
    assert search.reported(number, report(1, 1.5))
    finals = sweep.finals(search)
    line = f"final seeds  without trial {number}, the best: STOPPED, it has not run to its end"
    if has_other:
        assert sweep.said[0] == line and len(sweep.train(finals, sweep.own, lambda proposal: 2.1)) == 1
    else:
        assert finals is None and sweep.said == [f"{line}; no trial is trained again"]


def test_the_deviations_of_configs_are_pooled_by_their_degrees_of_freedom():
    found = (SeedLosses(0, (0, 1), (1.0, 2.0), ("", "")), SeedLosses(1, (0, 1, 2), (1.0, 2.0, 3.0), ("", "", "")))
    assert pooled_deviation(found) == pytest.approx(((0.5 + 2 * 1.0) / 3) ** 0.5)
    assert judge([], Rule()).seeds_line is None and pooled_deviation(()) is None


@pytest.mark.parametrize("space", [{"train.seed": {"choices": [1, 2]}}, {"train": {"seed": {"low": 1, "high": 5}}}])
def test_a_space_that_varies_the_seed_leaves_no_other_seed_to_try(space):
    values = {"model": {"path": "m"}, "data": {"train": "t"}, "train": {"max_tokens": 400}, "space": space}
    with pytest.raises(InputError, match=r"sweep.final_seeds = 2: must be 0 if the space varies train.seed"):
        parse_sweep_config({**values, "sweep": {"final_seeds": 2}})
    assert parse_sweep_config({**values, "sweep": {"final_seeds": 1}}).sweep.final_seeds == 1


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_sweep_that_is_stopped_among_its_finals_is_resumed_to_the_same_end(tmp_path, number):
    section = {"num_trials": 3, "final_seeds": 2}
    whole = {"pruner": {"name": "none"}}  # else who reports first decides how many trials are whole, and may be finalists
    process = start(tmp_path, optim={"eps": 0.5}, space={"lora.rank": {"choices": [2, 4, 8]}}, sweep=section, **whole)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("sweeps/*/final-seeds/trials/*/reports.jsonl")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=60)
    folder = sweep_folder(tmp_path)
    resumed = fake_driver("resume", str(folder))
    out, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    board = json.loads((folder / "leaderboard.json").read_text())
    assert [one["seeds"] for one in board["final_seeds"]] == [[0, 1]] * 2
    assert board["final_seeds"][0]["trial"] == board["best_trial"]
    assert "With other seeds, trial" in out and "With other seeds, trial" in (folder / "report.html").read_text()
    assert sum(row["outcome"] in ("COMPLETE", "PRUNED") for row in board["trials"]) == 3
    assert len(list(folder.glob("final-seeds/trials/*/result.json"))) == 2
