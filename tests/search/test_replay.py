"""Replays: the rules of the strategies that are not ours, what a cost allows, and what is chosen."""

from __future__ import annotations

import math

import pytest

from sweep.folder.sweep_folder import SweepFolder
from sweep.study.journal import read_trials
from sweep.trials.record import Outcome

from .clock import Choice, Clock, Turn
from .curve_figures import figures, seed_spread
from .curve_files import CURVES
from .measures import Judge, interval, rank_correlations, ratio_interval
from .peer_sides import OneLookSide, RandomSearcher, RayAshaSide, looks_and_finishers
from .points import Point, Task
from .product_side import ProductSide
from .recorded_tasks import content_of, make_task, read_tasks
from .replay import replay, shown_seeds
from .strategies import STRATEGIES, Setting
from .synthetic import make_content

RATE, RANK = "optim.learning_rate", "lora.rank"


@pytest.fixture(scope="module")
def made() -> Task:
    return make_task(make_content("usual", num_configs=24, num_twins=6))


def table(*curves: tuple[float, ...]) -> Task:
    """Return a task whose points differ in rate alone."""
    length = max(map(len, curves))
    points = [Point({RATE: 1e-4 * 2**i, RANK: 8}, (curve,), 100) for i, curve in enumerate(curves)]
    return Task("t", tuple(100 * rung for rung in range(1, length + 1)), tuple(points))


class InOrder:
    """Propose the points in their order."""

    def __init__(self, task: Task) -> None:
        self.task, self.number, self.told = task, -1, []

    def propose(self):
        self.number += 1
        return dict(self.task.points[self.number].params)

    def ended(self, params, eval_loss):
        self.told.append((params, eval_loss))


@pytest.mark.parametrize("name", ["random_halving", "tpe_halving", "random_hyperband", "optuna_asha", "one_look", "freeze_thaw"])
def test_a_replay_is_a_function_of_its_seed(made, name):
    costs = (1, 2)
    assert replay(made, name, 4, costs, seed=5) == replay(made, name, 4, costs, seed=5)
    assert any(replay(made, name, 4, costs, seed=5) != replay(made, name, 4, costs, seed) for seed in (6, 7, 8))


def test_ashas_verdicts_are_those_computed_by_hand():
    # at rung 1, a loss above the best quarter of those before it stops: linear percentile 25 of the losses
    #   1.00 nothing before it: goes on        0.90 quarter of (1.0) = 1.0: goes on
    #   0.95 of (0.9, 1.0) = 0.925: stops      0.92 of (0.9, 0.95, 1.0) = 0.925: goes on
    #   0.91 of (0.9, 0.92, 0.95, 1.0) = 0.915: goes on
    losses = (1.00, 0.90, 0.95, 0.92, 0.91)
    task = table(*[(loss, 0.5, 0.5, 0.5) for loss in losses])
    searcher = InOrder(task)
    side = RayAshaSide(task, searcher)
    turns = [side.next_trial() for _ in losses]
    assert [side.reported(turn, loss) for turn, loss in zip(turns, losses)] == [True, True, False, True, True]
    assert [loss for _, loss in searcher.told] == [0.95]  # OptunaSearch is told a stopped trial's last loss
    # between rungs nobody is stopped; the last rung stops everyone
    assert side.reported(Turn(0, 0, 2), 9.0) and side.reported(Turn(0, 0, 3), 9.0) and not side.reported(Turn(0, 0, 4), 0.1)
    assert side.chosen() == Choice(0, 4)


def test_one_look_spends_half_on_looks_and_half_on_finishing():
    # cost 4, a look of an eighth: floor(4 / 2 / 0.875) = 2 finish, and (4 - 2 * 0.875) / 0.125 = 18 are looked at
    assert looks_and_finishers(4, 1 / 8, 112) == (18, 2)
    assert looks_and_finishers(2, 1 / 8, 112) == (9, 1)
    assert looks_and_finishers(16, 1 / 8, 112) == (65, 9)
    # a table of 10 is looked at whole, and the rest finishes (16 - 10 / 8) / 0.875 = 16.9, of 10
    assert looks_and_finishers(16, 1 / 8, 10) == (10, 10)
    assert looks_and_finishers(3, 1.0, 112) == (3, 0)


def test_one_look_finishes_the_best_it_has_seen():
    task = table((0.9, 0.5), (0.7, 0.6), (0.8, 0.1), (0.6, 0.4))
    side = OneLookSide(task, InOrder(task), cost=2, look=0.5)
    assert (side.num_looks, side.num_finished) == (2, 2)
    side = OneLookSide(task, InOrder(task), cost=3, look=0.5)  # 3 finishers leave 3 looks
    assert (side.num_looks, side.num_finished) == (3, 3)
    side.num_finished = 1
    assert Clock(task, [0] * 4, 1, 0).run(side, [2.0]) == [Choice(1, 2)]  # looked at 0, 1, 2; 1 was best, though 2 ends lower


def test_a_report_after_the_cost_does_not_count():
    task = table((0.9, 0.8), (0.7, 0.3), (0.1, 0.1))
    side = RayAshaSide(task, InOrder(task), reduction_factor=2.5)  # two rungs: only the first judges
    at = Clock(task, [0] * 3, 1, 0).run(side, [0.4, 0.5, 1.0, 1.9, 2.0])
    assert at == [None, Choice(0, 1), Choice(0, 2), Choice(1, 1), Choice(1, 2)]


def test_slots_share_the_cost():
    task = table(*[(1.0 - 0.1 * i, 0.9 - 0.1 * i) for i in range(4)])
    for slots, cost, last in ((1, 1.0, 0), (4, 1.7, None), (4, 2.2, 3)):
        choice = Clock(task, [0] * 4, slots, 0).run(RayAshaSide(task, InOrder(task), 2.5), [cost])[0]
        assert (choice.point if choice else None) == last, (slots, cost)


def test_the_products_side_trains_each_recorded_config_once_and_the_journal_holds_it(made):
    for sampler in ("random", "tpe"):
        side = ProductSide(made, {"sampler": {"name": sampler}, "pruner": {"name": "none"}}, 4, 24, lambda: 0.0)
        turns = []
        while (turn := side.next_trial()) is not None:
            turns.append(turn)
            side.diverged(turn)
        assert sorted(turn.point for turn in turns) == list(range(24))
        for record in side._ledger.records:
            point = made.points[turns[record.number].point]
            assert record.params == {path: point.params[path] for path in made.axes}
            assert record.config["lora"]["lora_alpha"] == point.settings["lora"]["lora_alpha"]
            assert record.outcome is Outcome.DIVERGED


def test_what_a_replay_keeps_in_memory_is_the_journal_of_a_sweep(made, tmp_path):
    clock = Clock(made, [0] * 24, 2, 0)
    side = ProductSide(made, {"sampler": {"name": "tpe"}, "pruner": {"name": "successive_halving"}}, 2, 2, lambda: clock.now)
    clock.run(side, [2.0])
    folder = SweepFolder(tmp_path)
    folder.journal.write_text("".join(line + "\n" for line in side._study._storage._backend._lines))
    trials = read_trials(folder)
    assert len(trials) >= 3
    for trial in trials:
        losses = [report.eval_loss for report in side._folder.reports(trial.number)]
        assert list(trial.intermediate_values.values()) == losses
        assert trial.params == {path: made.points[made.nearest(trial.params)].params[path] for path in made.axes}


def test_a_pruned_trial_cannot_be_chosen_and_a_running_one_can():
    task = table((0.5, 0.5, 0.5, 0.5), (0.6, 0.1, 0.1, 0.1))
    side = ProductSide(task, {"sampler": {"name": "random"}, "pruner": {"name": "successive_halving"}}, 2, 8, lambda: 0.0)
    first, second = sorted((side.next_trial(), side.next_trial()), key=lambda turn: turn.point)
    assert side.chosen() is None
    assert side.reported(first, 0.5) and side.chosen() == Choice(0, 1)
    assert not side.reported(second, 0.6)  # the worse of two
    assert side.chosen() == Choice(0, 1)
    with_better = ProductSide(task, {"sampler": {"name": "random"}, "pruner": {"name": "none"}}, 2, 8, lambda: 0.0)
    first, second = sorted((with_better.next_trial(), with_better.next_trial()), key=lambda turn: turn.point)
    assert with_better.reported(first, 0.5) and with_better.reported(second, 0.4)
    assert with_better.chosen() == Choice(1, 1)


def test_with_the_prior_the_first_trial_has_the_known_rate_and_without_it_any_of_the_recorded_ones():
    points = [Point({RATE: float(f"{10 ** (-5 + 0.1 * i):.3g}"), RANK: 8}, ((1.0, 1.0),)) for i in range(31)]
    task = Task("t", (100, 200), tuple(points))
    rates = {}
    for prior in (True, False):
        sides = [
            ProductSide(task, {"sampler": {"name": "freeze_thaw"}, "sweep": {"seed": seed, "prior": prior}}, 1, 4, lambda: 0.0)
            for seed in range(4)
        ]
        rates[prior] = [task.points[side.next_trial().point].params[RATE] for side in sides]
    assert set(rates[True]) == {0.00126} and len(set(rates[False])) > 1  # 1.3e-3 at the base config's alpha of 32


def test_a_proposal_trains_the_nearest_config_and_the_rate_weighs_most():
    params = [{RATE: 1e-4, RANK: 8}, {RATE: 1e-3, RANK: 64}, {RATE: 1e-2, RANK: 8}]
    task = Task("t", (1, 2), tuple(Point(one, ((1.0, 1.0),)) for one in params))
    assert task.nearest({RATE: 1.2e-4, RANK: 64}) == 0  # same rank as 1, but a decade off in rate
    assert task.nearest({RATE: 9e-4, RANK: 8}) == 1
    assert task.nearest({RATE: 9e-4, RANK: 8}, [False, True, False]) == 0
    with pytest.raises(ValueError, match="used"):
        task.nearest(params[0], [True] * 3)


def test_each_replay_searches_a_part_of_the_table_in_the_same_space(made):
    parts = [made.part(0.75, seed) for seed in range(4)]
    held = [tuple(made.points.index(point) for point in part.points) for part in parts]
    assert {len(indices) for indices in held} == {18} and len(set(held)) == 4
    assert all(part.space_section == made.space_section for part in parts)
    assert made.part(0.75, 2).points == parts[2].points and made.part(1.0, 0).points == made.points


def test_luck_with_a_seed_is_judged_by_the_other_seed():
    lucky = Point({RATE: 1e-4, RANK: 8}, ((1.0, 0.50), (1.0, 0.60)))
    steady = Point({RATE: 1e-3, RANK: 8}, ((1.0, 0.52), (1.0, 0.54)))
    task = Task("t", (1, 2), (lucky, steady))
    regret = Judge(task).regret(Choice(0, 2), [0, 0])
    assert regret.seen == 0.0
    assert regret.judged == pytest.approx(0.60 - 0.53)  # above the lowest mean over seeds
    assert Judge(task).regret(None, [0, 0]).seen > 5.0
    assert {tuple(shown_seeds(task, seed)) for seed in range(20)} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_a_diverged_trial_frees_its_slot_and_is_not_chosen(made):
    task = table((), (0.7, 0.6), (0.9,))
    for name in ("random_halving", "random_asha", "one_look", "freeze_thaw"):
        clock = Clock(task, [0] * 3, 2, 0)
        side = STRATEGIES[name].make(Setting(task, 0, 2, 3.0, lambda clock=clock: clock.now))
        assert clock.run(side, [3.0])[0] == Choice(1, 2), name


def test_intervals_and_rank_correlations():
    assert interval([0.5] * 10) == (0.5, 0.5)
    low, high = interval([0.0, 1.0] * 50)
    assert 0.38 < low < 0.42 and 0.58 < high < 0.62
    mean, low, high = ratio_interval([1.0, 2.0], [2.0, 4.0])
    assert (mean, low, high) == (0.5, 0.5, 0.5)
    curves = [(3.0, 1.0), (2.0, 2.0), (1.0, 3.0), (9.0,)]
    assert rank_correlations(curves, [1.0, 2.0, 3.0, math.inf]) == pytest.approx([-1.0, 1.0])


def test_the_spread_of_seeds_is_the_standard_deviation_of_one_seed():
    known = {"lr_schedule": "cosine", "outcome": "COMPLETE"}
    trials = [
        {**known, "config": i, "seed": seed, "loss": [1.0 + i + seed * (-1) ** i * 0.02]} for i in range(4) for seed in (0, 1)
    ]
    assert seed_spread(trials) == (pytest.approx(0.02 / math.sqrt(2)), 4)


def test_the_recorded_tables_are_searched():
    tasks = read_tasks(CURVES)
    num_points = {task.name: len(task.points) for task in tasks}
    assert min(num_points.pop(name) for name in ("code", "docs", "requests")) > 100 and num_points["dialogue"] > 60
    for task in tasks:
        assert len(task.grid) == 16
        assert 0.0 <= replay(task, "one_look_16", 4, (8,), 0)[0].seen < 0.1
        assert len(figures(content_of(CURVES / f"{task.name}.json.gz"))) > 5


def test_random_searchers_of_ray_and_of_the_product_draw_the_same_configs(made):
    side = ProductSide(made, {"sampler": {"name": "random"}, "pruner": {"name": "none"}, "sweep": {"seed": 3}}, 6, 9, lambda: 0.0)
    searcher = RandomSearcher(made, 3)
    assert [side.next_trial().point for _ in range(6)] == [made.nearest(searcher.propose()) for _ in range(6)]


def test_setting_up_a_trial_costs_what_the_clock_is_told(made):
    task = table(*[(1.0 - 0.1 * i, 0.9 - 0.1 * i) for i in range(4)])
    for begin, cost, last in ((0.0, 1.9, 0), (0.0, 2.0, 1), (0.5, 2.9, 0), (0.5, 3.0, 1)):
        choice = Clock(task, [0] * 4, 1, 0, (begin, 0.0)).run(RayAshaSide(task, InOrder(task), 2.5), [cost])[0]
        assert choice.point == last, (begin, cost)
    assert looks_and_finishers(4, 1 / 8, 112, begin=0.125) == (9, 2)  # 4 - 2 * 0.875, a quarter of a trial each


def test_a_search_that_knows_its_price_begins_fewer_trials(made):
    begun = {}
    for begin in (0.0, 0.25):
        clock = Clock(made, [0] * 24, 1, 0, (begin, 0.0))
        side = STRATEGIES["freeze_thaw"].make(Setting(made, 0, 1, 4.0, lambda clock=clock: clock.now, (begin, 0.0)))
        clock.run(side, [4.0])
        begun[begin] = len(side._records)
        finished = [record for record in side._records.values() if record.outcome is Outcome.COMPLETE]
        assert finished and clock.cost <= 4.0 + 1e-9
    assert begun[0.25] < begun[0.0] and 0.25 * begun[0.25] + 1.0 <= 4.0
