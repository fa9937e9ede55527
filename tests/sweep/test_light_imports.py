"""A sweep's driver loads torch never, and Ray, MLflow and Optuna where it needs them."""

from __future__ import annotations

from tests.support.fresh_imports import too_heavy

RULES = [
    (
        (
            "sweep.config.sweep", "sweep.space.space", "sweep.space.parse", "sweep.folder.sweep_folder", "sweep.trials.record",
            "sweep.plan.sweep_plan", "sweep.driver",
        ),
        ("torch", "ray", "mlflow", "optuna"),
    ),
    (("sweep.tracking.tracker", "sweep.execution.tuner", "sweep.study.study"), ("torch", "mlflow")),
]  # fmt: skip


def test_the_driver_loads_no_torch_and_other_libraries_late():
    assert too_heavy(RULES) == []


def test_a_page_shows_its_table_before_plotly_hydra_and_plans_are_loaded():
    modules = ("sweep.ui.__main__", "sweep.ui.live_sweep", "sweep.ui.web_app", "sweep.ui.page_commands")
    assert too_heavy([(modules, ("torch", "ray", "mlflow", "plotly", "hydra", "sweep.plan.feasibility"))]) == []
