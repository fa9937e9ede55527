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
