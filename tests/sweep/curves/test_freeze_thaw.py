"""The policy's decisions, and what they are worth on made curves that it was not developed on."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from sweep.curves.freeze_thaw import FreezeThaw
from sweep.curves.observations import MOST_TRIALS, curve_of, seen_curves
from sweep.curves.situation import CurveState, GoOn, Situation, Stand, StartNew
from sweep.prior.rate_prior import RatePrior
from sweep.space.space import Choice, Range, Space
from sweep.trials.record import Outcome

RATE, RANK, TARGETS = "optim.learning_rate", "lora.rank", "lora.target_modules"
SPACE = Space((
    Choice(RANK, {4: 4, 16: 16, 64: 64}),
    Choice(TARGETS, {"attention": ["q_proj", "v_proj"], "all-linear": "all-linear"}),
    Range(RATE, 1e-5, 1e-2, log=True),
))  # fmt: skip
BASE = {
    "model": {"path": "m"}, "data": {"train": "d.jsonl"}, "lora": {"rank": 16, "lora_alpha": 32.0},
    "optim": {"learning_rate": 2e-4}, "train": {"max_tokens": 8_000},
}  # fmt: skip
GRID = tuple(1000 * rung for rung in range(1, 9))


class Table:
    """Trials of which the curves are known: a cup over the rate, and a bump early on that hides high rates."""

    def __init__(self, seed, num_trials=40):
        draw = random.Random(seed)
        best, heat, self.params, self.curves = draw.uniform(-3.8, -2.8), draw.uniform(0.02, 0.08), [], []
        for _ in range(num_trials):
            rank, targets, log_rate = draw.choice([4, 16, 64]), draw.choice(["attention", "all-linear"]), draw.uniform(-5, -2)
            self.params.append({RANK: rank, TARGETS: targets, RATE: 10.0**log_rate})
            away = log_rate - best
            floor = 2.0 + 0.1 * away**2 * (2.0 if away > 0 else 1.0) + 0.01 * math.log2(64 / rank)
            floor += 0.015 * (targets == "attention") + draw.gauss(0.0, 0.002)
            self.curves.append([
                floor + 0.3 / (1.0 + 8.0 * rung / 8) + heat * 10 ** min(away, 1.0) * (1.0 - rung / 8) + draw.gauss(0.0, 0.002)
                for rung in range(1, 9)
            ])  # fmt: skip
        self.best = min(curve[-1] for curve in self.curves)


class Halving:
    """Random draws; a trial goes on past 1, 2 and 4 eighths if it is in the better half of those seen there."""

    def __init__(self, table, seed):
        self.order, self.seen = random.Random(seed).sample(range(len(table.params)), len(table.params)), {}

    def regret(self, table, tokens):
        lowest = math.inf
        for index in self.order:
            for rung, loss in enumerate(table.curves[index], 1):
                tokens -= 1000
                if tokens < 0:
                    return lowest - table.best
                lowest = min(lowest, loss)
                at = self.seen.setdefault(rung, [])
                at.append(loss)
                if rung in (1, 2, 4) and loss > sorted(at)[max(0, len(at) // 2 - 1)]:
                    break
        return lowest - table.best


class Play:
    """A sweep of the policy over a table's trials."""

    def __init__(self, table, full_trials, num_slots=1, seed=0):
        self.table, self.tokens, self.num_slots = table, full_trials * GRID[-1], num_slots
        self.policy = FreezeThaw(SPACE, BASE, GRID, seed)
        self.points = random.Random(f"play {seed}").sample(table.params, len(table.params))
        self.trials, self.index, self.decisions = {}, {}, []

    def situation(self):
        running = sum(1000 for trial in self.trials.values() if trial.stand is Stand.RUNNING)
        candidates = [point for point in self.points if self.table.params.index(point) not in self.index.values()]
        return Situation(self.trials, candidates, self.tokens - running, self.num_slots, 999)

    def run(self):
        """Run to the end, and return the regret of the trial with the lowest loss."""
        running = []
        while True:
            while len(running) < self.num_slots:
                decision = self.policy.decide(self.situation())
                if decision is None:
                    break
                self.decisions.append(decision)
                running.append(self._start(decision))
            if not running:
                lowest = min(trial.losses[-1] for trial in self.trials.values() if trial.losses)
                return lowest - self.table.best
            self._report(running.pop(0))

    def _start(self, decision):
        if isinstance(decision, StartNew):
            number = len(self.trials)
            self.index[number] = self.table.params.index(decision.params)
            self.trials[number] = CurveState(number, decision.params, (), Stand.RUNNING, Outcome.RUNNING)
            return number
        old = self.trials[decision.number]
        assert old.stand is Stand.FREE
        self.trials[decision.number] = replace(old, stand=Stand.RUNNING, outcome=Outcome.RUNNING)
        return decision.number

    def _report(self, number):
        self.tokens -= 1000
        assert self.tokens >= 0, "the policy keeps to its tokens"
        losses = tuple(self.table.curves[self.index[number]][: len(self.trials[number].losses) + 1])
        stand, outcome = (Stand.OVER, Outcome.COMPLETE) if len(losses) == 8 else (Stand.FREE, Outcome.PAUSED)
        self.trials[number] = replace(self.trials[number], losses=losses, stand=stand, outcome=outcome)


def num_finished(play):
    return sum(len(trial.losses) == 8 for trial in play.trials.values())


def halfway(seed=1, num_slots=1):
    """Return a play of which half the tokens are spent."""
    play = Play(Table(seed), 4, num_slots)
    play.policy, real = None, play.policy
    play.policy = type("Until", (), {"decide": lambda self, now: real.decide(now) if now.tokens_left > 16_000 else None})()
    play.run()
    return play


def fresh_policy():
    return FreezeThaw(SPACE, BASE, GRID, 0)


@pytest.mark.parametrize("num_slots", [1, 4])
def test_it_loses_at_most_half_of_what_halving_loses(num_slots):
    tables = [Table(seed) for seed in range(8)]
    draws = range(20)
    ours = np.mean([Play(table, 4, num_slots, seed).run() for seed, table in enumerate(tables)])
    halving = np.mean([Halving(table, draw).regret(table, 32_000) for table in tables for draw in draws])
    assert ours <= 0.5 * halving


@pytest.mark.parametrize("num_slots", [1, 4, 16])
@pytest.mark.parametrize("full_trials", [1, 2, 4])
def test_the_tokens_always_end_with_a_finished_trial(full_trials, num_slots):
    play = Play(Table(3), full_trials, num_slots)
    play.run()
    assert num_finished(play) >= 1
    assert play.tokens < 8_000


def test_less_than_one_full_trial_is_spent_on_the_most_promising():
    play = Play(Table(3), 0.75)
    play.run()
    assert play.tokens < 1_000


def test_the_same_situation_gets_the_same_decision_from_a_new_policy():
    play = Play(Table(2), 2, num_slots=4)
    asked = []
    real = play.policy.decide
    play.policy.decide = lambda now: asked.append((replace(now, trials=dict(now.trials)), real(now))) or asked[-1][1]
    play.run()
    assert len(asked) > 20
    assert all(fresh_policy().decide(now) == decision for now, decision in asked)


def test_the_numbers_of_trials_do_not_matter():
    now = halfway().situation()
    decision = fresh_policy().decide(now)
    order = random.Random(0).sample(sorted(now.trials), len(now.trials))
    renamed = {new: replace(now.trials[old], number=new) for new, old in enumerate(order)}
    again = fresh_policy().decide(replace(now, trials=renamed))
    if isinstance(decision, GoOn):
        assert order[again.number] == decision.number
    else:
        assert again == decision


def test_the_order_of_candidates_does_not_matter():
    now = halfway().situation()
    ended = {n: replace(trial, stand=Stand.OVER, outcome=Outcome.FAILED) for n, trial in now.trials.items()}
    free = replace(now, trials=ended)
    decision = fresh_policy().decide(free)
    assert isinstance(decision, StartNew)
    assert fresh_policy().decide(replace(free, candidates=free.candidates[::-1])) == decision


def thawed(play):
    """Return the trials that went on, waited while others trained, and went on again."""
    went_on = [decision.number if isinstance(decision, GoOn) else None for decision in play.decisions]
    return {n for k, n in enumerate(went_on) if n is not None and n in went_on[: max(k - 1, 0)] and went_on[k - 1] != n}


def test_trials_that_waited_for_others_go_on_later():
    plays = [Play(Table(seed), 4) for seed in range(4)]
    for play in plays:
        play.run()
    assert any(thawed(play) for play in plays)


def test_no_winner_is_settled_while_a_rival_s_report_is_awaited():
    """16 slots and 16 steps: 9 looks, then the 7 steps that finish one trial, chosen when all have reported."""
    play = Play(Table(3), 2, num_slots=16)
    decide, waiting = play.policy.decide, []

    def noted(now):
        decision = decide(now)
        if isinstance(decision, GoOn):
            waiting.append(sum(trial.stand is Stand.RUNNING for trial in now.trials.values()))
        return decision

    play.policy.decide = noted
    play.run()
    assert len(play.trials) == 9
    assert waiting == [0] * 7


def test_nothing_is_decided_where_nothing_fits():
    now = halfway().situation()
    assert fresh_policy().decide(replace(now, tokens_left=999)) is None
    assert fresh_policy().decide(Situation({}, [], 10**6, 1, 0)) is None


def test_a_trial_that_cannot_go_on_is_left_alone_and_not_waited_for():
    now = halfway().situation()
    ended = {n: replace(t, stand=Stand.OVER, outcome=Outcome.FAILED) for n, t in now.trials.items()}
    assert isinstance(fresh_policy().decide(replace(now, trials=ended)), StartNew)


def test_diverged_trials_and_losses_that_are_not_finite_teach_without_harm():
    now = halfway().situation()
    first = min(now.trials)
    for losses in ((), (2.5,), (2.5, math.nan), (math.inf,)):
        state = replace(now.trials[first], losses=losses, stand=Stand.OVER, outcome=Outcome.DIVERGED)
        decision = fresh_policy().decide(replace(now, trials={**now.trials, first: state}))
        assert decision is not None and decision != GoOn(first)


def test_trials_of_earlier_sweeps_teach_but_are_not_finished():
    now = halfway().situation()
    earlier = {n: replace(t, stand=Stand.OVER, is_earlier=True) for n, t in now.trials.items()}
    decision = fresh_policy().decide(Situation(earlier, now.candidates, 32_000, 1, 9))
    assert isinstance(decision, StartNew)


KNOWN = RatePrior(math.log(1e-3), 0.8, "a rule")


def looks(behind=0.3, rate=1e-3, tokens=20_000, num_rungs=1):
    """Return a sweep with six looks, of which the first, at a known good rate, is behind."""
    losses = [2.0 + behind, 2.0, 2.02, 2.03, 2.05, 2.06]
    rates = [rate, 2e-4, 1e-4, 3e-4, 4e-4, 5e-4]
    trials = {n: CurveState(n, {RANK: 16, TARGETS: "all-linear", RATE: r}, (loss,), Stand.FREE, Outcome.PAUSED)
              for n, (loss, r) in enumerate(zip(losses, rates))}  # fmt: skip
    trials[0] = replace(trials[0], losses=tuple(losses[0] - 0.01 * rung for rung in range(num_rungs)))
    return Situation(trials, Table(6, 20).params, tokens, 1, 9)


def trusting_policy(rate_prior=KNOWN):
    return FreezeThaw(SPACE, BASE, GRID, 0, rate_prior)


def test_a_first_trial_of_a_good_rate_that_looks_bad_early_is_trained_to_its_end():
    assert trusting_policy().decide(looks()) == GoOn(0)
    assert trusting_policy().decide(looks(num_rungs=6, tokens=2_000)) == GoOn(0)
    given_up = [looks(behind=0.03), looks(rate=9e-3), looks(tokens=13_000), looks(num_rungs=6, tokens=1_000)]
    assert all(trusting_policy().decide(now) != GoOn(0) for now in given_up)
    assert trusting_policy(None).decide(looks()) != GoOn(0)


def test_the_first_winner_is_trained_to_its_end_while_the_tokens_finish_two_more():
    now = looks(behind=0.03, tokens=18_000)
    winner = trusting_policy().decide(now)
    ended = replace(now.trials[winner.number], losses=(2.0,) * 8, stand=Stand.OVER, outcome=Outcome.COMPLETE)
    others = [looks(0.03, tokens=16_000), looks(0.03, tokens=20_000), replace(now, trials={**now.trials, winner.number: ended})]
    assert isinstance(winner, GoOn) and all(isinstance(trusting_policy().decide(other), StartNew) for other in others)


def test_whole_curves_of_an_earlier_sweep_tell_what_first_losses_are_worth():
    now = looks()
    earlier = replace(now.trials[1], number=-1, losses=(2.0,) * 8, stand=Stand.OVER, outcome=Outcome.COMPLETE, is_earlier=True)
    assert trusting_policy().decide(replace(now, trials={-1: earlier, **now.trials})) != GoOn(0)


def test_of_many_trials_the_model_sees_the_best_and_a_share():
    states = [CurveState(n, {}, (3.0 - n / 1000,), Stand.FREE, Outcome.PAUSED) for n in range(1000)]
    seen = [curve.state.number for curve in seen_curves([curve_of(state) for state in states])]
    assert len(seen) == MOST_TRIALS and set(range(950, 1000)) < set(seen) and min(seen) < 100


def test_a_thousand_trials_are_decided_on():
    table = Table(5, 1000)
    trials = {
        n: CurveState(n, params, tuple(curve[: 1 + n % 8]), Stand.OVER if n % 8 == 7 else Stand.FREE, Outcome.PAUSED)
        for n, (params, curve) in enumerate(zip(table.params, table.curves))
    }
    assert fresh_policy().decide(Situation(trials, Table(6, 256).params, 10**5, 16, 99)) is not None
