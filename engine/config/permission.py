"""Take permission to run a model's own code, or the user's metrics, from the command line alone. No torch."""

from __future__ import annotations

from engine.config.trial import ModelConfig, TrainConfig
from engine.errors import InputError

FLAG = "--trust-remote-code"
METRICS_FLAG = "--run-own-metrics"


def permitted(model: ModelConfig, trust_remote_code: bool) -> ModelConfig:
    """Return the model section with the permission that the command line gave.

    InputError if the section asks for more: the file that holds it may be anyone's.
    """
    if model.trust_remote_code and not trust_remote_code:
        allowed = f"a file cannot permit that the model's own code runs; if you trust the code of {model.path!r}, add {FLAG}"
        raise InputError("model.trust_remote_code", True, allowed)
    return model.model_copy(update={"trust_remote_code": trust_remote_code})


def permitted_config(config: TrainConfig, trust_remote_code: bool, own_metrics: bool = False) -> TrainConfig:
    """Return the config with the model section of `permitted`.

    own_metrics: whether functions of metrics.own may run. InputError if the config names some and they may not.
    """
    if config.metrics.own and not own_metrics:
        name, metric = next(iter(config.metrics.own.items()))
        allowed = f"a file cannot permit that a function runs; if you trust it, add {METRICS_FLAG}"
        raise InputError(f"metrics.{name}", metric.function, allowed)
    return config.model_copy(update={"model": permitted(config.model, trust_remote_code)})
