"""With several objectives the study minimises all, and the lowest loss still wins.

The front holds the trials that no other beats.
"""

from __future__ import annotations

import json
import math
import random

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InputError
from sweep.config.sweep import parse_sweep_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.ledger.ledger import Next
from sweep.plan.feasibility import Fit
from sweep.plan.sweep_plan import make_sweep_plan
from sweep.results.leaderboard import write_leaderboard
from sweep.results.verdict import judge
from sweep.space.parse import parse_space
from sweep.study.study import Study
from sweep.trials.objectives import objective_values, pareto_front
from sweep.trials.record import Outcome
from sweep.trials.selection import Rule
from tests.support.records import trial
from tests.support.studies import WIDE, config_for, ledger_in, report, study_in, write_reports

THREE = ("eval_loss", "peak_allocated_gib", "elapsed_s")


def measured(number: int, loss: float, peak: float, elapsed: float, **changes):
    return trial(number, loss, reported={"peak_allocated_gib": peak, "elapsed_s": elapsed}, **changes)


def numbers(records):
    return [record.number for record in records]


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=12))
def test_the_front_is_that_of_optuna(points):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=["minimize"] * 3)
    for values in points:
        study.add_trial(optuna.trial.create_trial(values=values))
    records = [measured(number, *map(float, values)) for number, values in enumerate(points)]
    assert sorted(numbers(pareto_front(records, THREE))) == sorted(trial.number for trial in study.best_trials)


def test_only_complete_trials_of_this_sweep_that_were_measured_are_on_the_front():
    records = [
        measured(0, 2.0, 2.0, 2.0),
        measured(1, 1.0, 1.0, 1.0, outcome=Outcome.STOPPED),
        measured(2, 1.0, 1.0, 1.0, source="old trial 2"),
        measured(3, float("nan"), 1.0, 1.0),
        measured(4, 3.0, 1.0, 3.0),
        measured(5, 3.0, 3.0, 3.0),
    ]
    assert numbers(pareto_front(records, THREE)) == [0, 4]
    assert objective_values(trial(6), THREE) is None


def test_the_winner_is_the_lowest_loss_unless_it_may_cost_something():
    records = [
        measured(0, 1.00, 20.0, 9.0),
        measured(1, 1.02, 10.0, 9.0),
        measured(2, 1.03, 10.0, 5.0),
        measured(3, 1.5, 1.0, 1.0),
    ]
    assert Rule(THREE).best(records).number == 0
    assert Rule(THREE, 0.02).best(records).number == 1
    assert Rule(THREE, 0.05).best(records).number == 2
    assert Rule(("eval_loss", "num_trainable"), 0.05).best(records).number == 0
    assert "within 0.05 nats of it, the lowest peak_allocated_gib, then the lowest elapsed_s" in Rule(THREE, 0.05).text
    assert "peak_allocated_gib" not in Rule(THREE).text


SLOW_GP = pytest.param("gp", marks=pytest.mark.faults)  # three Gaussian processes: 3 s a proposal


@pytest.mark.parametrize("sampler", ["tpe", SLOW_GP, "nsga2", "random"])
def test_a_study_of_three_objectives_runs_with_faults_and_is_read_back(tmp_path, sampler):
    """Covers trials past the random start, infeasible points, out-of-memory errors and a resume."""
    config = config_for(WIDE, sampler, num_trials=24, objectives=list(THREE))
    rng = random.Random(0)

    def judge(train):
        return Fit(None, None if train.lora.rank < 8 else "too large", 1.0, -1.0 if train.lora.rank < 8 else 1.0)

    def ledger():
        study = Study(SweepFolder(tmp_path), config, parse_space(config.space), judge)
        book = ledger_in(tmp_path, config, study=study)
        book.recover()
        return book

    book, count = ledger(), 0
    while (proposal := book.next_trial()) is not Next.FINISHED:
        count += 1
        last = report(4, 1.0 + rng.random(), peak_allocated_gib=rng.random(), elapsed_s=rng.random())
        earlier = [report(rung, 99.0, peak_allocated_gib=0.0) for rung in (1, 2, 3)]
        write_reports(tmp_path, proposal.number, [*earlier, last])
        assert not book.reported(proposal.number, earlier[0])  # nothing is pruned
        book.ended(
            proposal.number, Outcome.OUT_OF_MEMORY if count % 7 == 0 else Outcome.COMPLETE, None if count % 7 == 0 else last
        )
        if count == 12:
            book = ledger()
    records = study_in(tmp_path, config).records()
    outcomes = [record.outcome for record in records]
    assert outcomes.count(Outcome.COMPLETE) == 21 and outcomes.count(Outcome.OUT_OF_MEMORY) == 3
    journal = study_in(tmp_path, config)._trials()
    assert [trial.values for trial in journal if trial.state.name == "COMPLETE"] == [
        list(objective_values(record, THREE)) for record in records if record.outcome is Outcome.COMPLETE
    ]


def test_a_complete_trial_without_a_measure_is_failed_and_says_which(tmp_path):
    config = config_for(WIDE, objectives=list(THREE))
    book = ledger_in(tmp_path, config)
    number = book.next_trial().number
    book.ended(number, Outcome.COMPLETE, report(4, 1.0, peak_allocated_gib=math.nan))
    assert book.records[0].outcome is Outcome.FAILED and "peak_allocated_gib" in book.records[0].error


def test_the_leaderboard_shows_the_front_with_every_members_adapter(tmp_path):
    records = [
        measured(0, 1.0, 20.0, 9.0, folder="f/0000"),
        measured(1, 1.2, 10.0, 9.0, folder="f/0001"),
        measured(2, 1.3, 30.0, 9.0),
    ]
    write_leaderboard(tmp_path, records, "demo", judge(records, Rule(THREE)))
    board = json.loads((tmp_path / "leaderboard.json").read_text())
    assert [(row["number"], row["peak_allocated_gib"], row["adapter"]) for row in board["pareto_front"]] == [
        (0, 20.0, "f/0000/adapter"),
        (1, 10.0, "f/0001/adapter"),
    ]
    text = (tmp_path / "leaderboard.md").read_text()
    assert "## Pareto front of eval_loss, peak_allocated_gib, elapsed_s" in text and "`f/0001/adapter`" in text
    write_leaderboard(tmp_path, records, "demo", judge(records, Rule()))
    assert "Pareto" not in (tmp_path / "leaderboard.md").read_text()


def test_the_plan_says_that_nothing_is_pruned():
    text = make_sweep_plan(config_for(WIDE, objectives=["eval_loss", "elapsed_s"])).describe()
    assert "none: successive_halving is off, because Optuna cannot prune with several objectives" in text
    assert "objectives eval_loss, elapsed_s" in text
    assert "successive_halving is off" not in make_sweep_plan(config_for(WIDE)).describe()


@pytest.mark.parametrize(
    ("sections", "part"),
    [
        ({"sweep": {"objectives": ["elapsed_s"]}}, "sweep.objectives"),
        ({"sweep": {"objectives": ["eval_loss", "eval_loss"]}}, "sweep.objectives"),
        ({"sweep": {"objectives": ["eval_loss", "speed"]}}, "peak_allocated_gib, elapsed_s, num_trainable"),
        ({"sweep": {"objectives": ["eval_loss", "elapsed_s"]}, "sampler": {"name": "cmaes"}}, "takes one objective"),
        ({"sweep": {"choose_within": 0.1}}, "sweep.choose_within"),
    ],
)
def test_objectives_that_cannot_be_are_one_line(sections, part):
    base = {"model": {"path": "m"}, "data": {"train": "t"}, "train": {"max_tokens": 400, "num_reports": 4}}
    with pytest.raises(InputError) as error:
        parse_sweep_config({**base, **sections})
    assert part in str(error.value) and "\n" not in str(error.value)
