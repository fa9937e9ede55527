"""Give the answer of `engine prepare` without running it."""

from __future__ import annotations

from engine.command_answers import Facts, PreparedFacts
from tests.support.fake_engine import SHAPE
from tests.support.reports import make_account


def prepared(facts: Facts | None = None, **changes) -> PreparedFacts:
    """Return what prepare finds for good data, with the shape and card of `facts`, and with changes."""
    facts = facts or Facts(shape=SHAPE)
    values = {
        "shape": facts.shape, "card": facts.card, "host_gib": facts.host_gib, "model_path": "m", "layers": "-",
        "num_train_samples": 1000, "num_eval_samples": 100, "num_dropped_samples": 0, "num_trainable": [1], "data": {},
    }  # fmt: skip
    num_tokens = changes.pop("num_train_tokens", 10**9)
    lost = {"num_bad": 0, "num_cut": 0, "num_dropped": 0, "num_lost_tokens": 0}
    clean = make_account(num_used=50, num_tokens=num_tokens, **lost)
    return PreparedFacts(**{**values, "accounts": [clean], **changes})
