"""Whether a trial fits the card, asked before it is started: the engine's own plan, made in the driver. No torch.

Nothing is predicted for a CPU, for a model of unknown shape and without a card; everything then counts as fitting.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.cards import CARDS, Card, found_card
from engine.config import TrainConfig
from engine.errors import OutOfMemory
from engine.planner import Plan, plan
from engine.shape import ModelShape

LEAST_EXCESS_GIB = 0.01  # what does not fit for want of its reserve alone violates the constraint too
WITHOUT_EFFECT = {
    "lora": ("lora_alpha", "use_rslora"),
    "optim": ("learning_rate", "lr_schedule", "warmup_ratio", "min_lr_ratio", "weight_decay", "beta1", "beta2", "eps"),
    "train": ("seed", "profile_steps"),
}
"""Fields that change neither memory nor speed: a plan takes up to a second, and trials that differ in these alone share one."""


@dataclass(frozen=True)
class Verdict:
    """plan: how the trial would be computed, None where nothing is predicted or nothing fits. reason: why it does not fit.

    excess_gib: predicted need above what there is; above 0 exactly where it does not fit.
    """

    plan: Plan | None = None
    reason: str | None = None
    predicted_peak_gib: float | None = None
    excess_gib: float | None = None

    @property
    def fits(self) -> bool:
        return self.reason is None


UNPREDICTED = Verdict()


def has_no_effect(path: str) -> bool:
    """Whether memory and speed are the same for all values of this field."""
    section, key = path.split(".")
    return key in WITHOUT_EFFECT.get(section, ())


class Feasibility:
    """Judges configs for one model on one card, in a machine with so much host memory for a trial."""

    def __init__(self, shape: ModelShape | None, card: Card | None, host_gib: float = math.inf) -> None:
        self.shape, self.card, self._host_gib = shape, card, host_gib
        self._known: dict[str, Verdict] = {}

    @property
    def predicts(self) -> bool:
        return self.shape is not None and self.card is not None

    def judge(self, config: TrainConfig) -> Verdict:
        """Whether the config fits, and how it would be computed."""
        if not self.predicts or config.train.device == "cpu":
            return UNPREDICTED
        key = _key(config)
        if key not in self._known:
            self._known[key] = self._judge(config, self.card)
        return self._known[key]

    def _judge(self, config: TrainConfig, card: Card) -> Verdict:
        allowed_gib = min(card.memory_gib, config.train.memory_budget_gib or card.memory_gib)
        try:
            chosen = plan(config, self.shape, card, self._host_gib)
        except OutOfMemory as error:
            above = 0.0 if error.predicted_gib is None else error.predicted_gib - allowed_gib
            return Verdict(None, error.line, error.predicted_gib, max(above, LEAST_EXCESS_GIB))
        need_gib = chosen.memory.peak_gib + chosen.memory.reserve_gib
        return Verdict(chosen, None, chosen.memory.peak_gib, min(need_gib - allowed_gib, 0.0))


def _key(config: TrainConfig) -> str:
    """What a plan depends on. Not the config's fingerprint, which leaves out what changes memory and nothing else."""
    values = config.model_dump(mode="json")
    for section, fields in WITHOUT_EFFECT.items():
        for field in fields:
            del values[section][field]
    values["lora"]["lora_dropout"] = config.lora.lora_dropout > 0.0
    return json.dumps(values, sort_keys=True)


def make_feasibility(card_name: str, facts: Mapping[str, Any]) -> Feasibility:
    """card_name: cluster.card. facts: what `engine.prepare.look` found, as plain data. The host memory found counts where there
    is a GPU: elsewhere the trials will have another host."""
    shape, found, host_gib = facts.get("shape"), facts.get("card"), facts.get("host_gib")
    here = math.inf if found is None or host_gib is None else host_gib
    return Feasibility(ModelShape(**shape) if shape else None, _card(card_name, found), here)


def _card(name: str, found: Mapping[str, Any] | None) -> Card | None:
    """The card by that name; for auto, the one found, with the memory it says it has."""
    if name != "auto":
        return CARDS[name]
    if found is None:
        return None
    return found_card(found["name"], found["memory_gib"])
