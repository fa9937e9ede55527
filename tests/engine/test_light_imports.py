"""What a laptop, a driver and a command's first answer need of the engine loads no heavy library."""

from __future__ import annotations

from tests.support.fresh_imports import too_heavy

SWEEPS = ("ray", "mlflow", "optuna", "hydra")
RULES = [
    (("engine.sources.builtin",), ("torch", "gguf", "numpy", "transformers", *SWEEPS)),
    (
        ("engine.config.trial", "engine.errors", "engine.trial_report", "engine.system.files", "engine.system.shared_cache"),
        ("torch", "transformers", *SWEEPS),
    ),
    (
        ("engine.shape.model_shape", "engine.memory.prediction", "engine.planning.planner", "engine.planning.speed"),
        ("torch", "transformers"),
    ),
    (("engine.kernels.ops",), ("triton", "bitsandbytes")),
]


def test_modules_that_must_answer_at_once_load_no_heavy_library():
    assert too_heavy(RULES) == []
    assert too_heavy([(("engine.errors", "numpy"), ("numpy",))]) == ["numpy loads numpy"]  # the twin
