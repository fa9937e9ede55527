"""Say by which key a config counts as tried."""

from __future__ import annotations

from optuna.trial import FrozenTrial

from engine.config.parsing import to_json
from engine.config.trial import TrainConfig
from sweep.trials.record import Outcome


def is_refused(trial: FrozenTrial) -> bool:
    """Return whether the trial was never started, because it does not fit."""
    return trial.user_attrs.get("outcome") == Outcome.INFEASIBLE


def config_key(config: TrainConfig, refused: bool) -> str:
    """Return the key by which a config counts as known.

    A config that did not fit stands for itself alone, because it may fit with another micro-batch.
    """
    return to_json(config) if refused else config.fingerprint()
