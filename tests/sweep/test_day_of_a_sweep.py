"""A chat template that prints the day prints one day for a whole sweep, its resumes included."""

from dataclasses import replace

import pytest

from engine.command_answers import PreparedFacts
from sweep import driver
from sweep.folder.sweep_folder import SweepFolder
from tests.support.fake_sweeps import BASE

FACTS = PreparedFacts(
    model_path="m", layers="-", num_train_samples=8, num_eval_samples=2, num_dropped_samples=0, num_trainable=[1], data={}
)


@pytest.fixture
def launch(monkeypatch, tmp_path):
    """Return a function that starts or resumes a sweep which runs no trial; it returns the sweep's folder."""

    def _launch(day, resumed=None, **sections):
        ran = []
        monkeypatch.setattr(driver, "prepare", lambda probes, module: replace(FACTS, day=probes[0].data.date or day))

        def run(plan, folder, *rest):
            folder.write_config(plan.config)
            ran.append((plan, folder))
            return 0

        monkeypatch.setattr(driver, "_run", run)
        cluster = {"num_gpus": 0, "num_cpu_slots": 1}
        raw = {**BASE, "cluster": cluster, "sweep": {"output_dir": str(tmp_path), **sections.pop("sweep", {})}, **sections}
        assert (driver.resume(str(resumed), {}) if resumed else driver.start(raw)) == 0
        ((plan, folder),) = ran
        return plan, folder.path

    return _launch


def test_a_sweep_keeps_the_day_on_which_its_data_were_prepared(launch):
    plan, folder = launch("2026-11-26")
    assert plan.base()["data"]["date"] == SweepFolder.open(str(folder)).read_config().data.date == "2026-11-26"
    resumed, _ = launch("2026-11-27", resumed=folder)
    assert resumed.base()["data"]["date"] == "2026-11-26"


def test_a_day_that_is_given_stays(launch):
    plan, _ = launch("2026-11-26", data={**BASE["data"], "date": "2025-01-31"})
    assert plan.config.data.date == "2025-01-31"


def test_a_sweep_whose_template_prints_no_day_has_none(launch):
    """Its trials are then the same configs on any day."""
    plan, _ = launch(None)
    assert plan.config.data.date is None


def test_a_sweep_that_learns_from_an_earlier_one_has_its_day(launch, monkeypatch):
    _, earlier = launch("2026-11-26")
    monkeypatch.setattr(driver, "_check_warm_start", lambda *rest: None)
    plan, _ = launch("2026-12-24", sweep={"warm_start": [str(earlier)]})
    assert plan.config.data.date == "2026-11-26"
