"""The first points enter the journal once, and each is tried once, whatever happens in between."""

from __future__ import annotations

import pytest

from sweep.plan.feasibility import Fit
from sweep.prior.rate_prior import RatePrior
from sweep.space.parse import parse_space
from sweep.study.study import Study
from sweep.trials.record import Outcome
from tests.support.studies import SMALL, WIDE, config_for, finish_one, study_in

RATE = RatePrior(-8.0, 0.8, "a rule")
POINTS = [{"lora.rank": rank, "lora.use_rslora": False, "optim.learning_rate": rate} for rank, rate in ((4, 1e-3), (8, 2e-3))]


def begun(path, points=POINTS, sampler="random", rate=RATE):
    study = study_in(path, config_for(WIDE, sampler, pruner="none"))
    study.beginning.keep(points, rate)
    return study


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "nsga2"])
def test_the_first_points_are_the_first_trials_of_every_sampler_and_then_it_goes_on_alone(tmp_path, sampler):
    study = begun(tmp_path, sampler=sampler)
    trials = [study.ask().params for _ in range(5)]
    assert trials[:2] == POINTS and all(point not in POINTS for point in trials[2:])


def test_a_resume_goes_on_behind_the_points_that_were_tried(tmp_path):
    begun(tmp_path).ask()
    again = study_in(tmp_path, config_for(WIDE, "random", pruner="none"))
    assert again.beginning.rate == RATE
    assert again.ask().params == POINTS[1] and again.ask().params not in POINTS


def test_what_the_journal_has_stays_though_a_resume_computes_something_else(tmp_path):
    begun(tmp_path)
    again = begun(tmp_path, POINTS[::-1], rate=None)
    assert again.beginning.rate == RATE and again.ask().params == POINTS[0]


def test_a_sweep_of_an_older_version_gets_none_on_a_resume(tmp_path):
    finish_one(study_in(tmp_path, config_for(WIDE, "random", pruner="none")))
    again = begun(tmp_path)
    assert again.beginning.rate is None and again.ask().params not in POINTS


def test_a_kill_between_the_two_records_leaves_a_beginning_that_the_resume_completes(tmp_path):
    study = study_in(tmp_path, config_for(WIDE, "random", pruner="none"))
    study._study.set_user_attr("rate_prior", RATE.to_dict())
    assert begun(tmp_path).ask().params == POINTS[0]


def test_a_grid_tries_the_first_points_before_the_others_and_no_point_twice(tmp_path):
    study = study_in(tmp_path, config_for(SMALL, "grid", pruner="none"))
    study.beginning.keep([{"lora.rank": 8, "lora.use_rslora": True}, {"lora.rank": 2, "lora.use_rslora": False}], None)
    trials = []
    while (proposal := study.ask()) is not None:
        trials.append(tuple(proposal.params.values()))
    assert trials[:2] == [(8, True), (2, False)] and len(set(trials)) == len(trials) == 6


def test_a_point_that_does_not_fit_ends_as_infeasible_and_the_next_one_is_tried(tmp_path):
    def fits(config):
        return Fit(reason="too large", excess_gib=1.0) if config.lora.rank == 4 else Fit()

    config = config_for(WIDE, "random", pruner="none")
    from sweep.folder.sweep_folder import SweepFolder

    study = Study(SweepFolder(tmp_path), config, parse_space(config.space), fits)
    study.beginning.keep(POINTS, None)
    first, second = study.ask(), study.ask()
    assert study.record(first.number).outcome is Outcome.INFEASIBLE and second.params == POINTS[1]
