"""Predict whether a trial fits the card, before it starts.

The driver makes the engine's own plan, without torch. It predicts nothing for a CPU, for a model of
unknown shape, or without a card; then every config counts as fitting.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from engine.command_answers import Facts, VisibleCard
from engine.config.trial import TrainConfig
from engine.errors import OutOfMemory
from engine.planning.cards import CARDS, Card, found_card, match_card
from engine.planning.compute_plan import ComputePlan
from engine.planning.known_cards import with_known_rates
from engine.planning.planner import make_compute_plan
from engine.planning.speed import SpeedPrediction, predict_evaluation
from engine.shape.model_shape import ModelShape
from sweep.cluster.card_kinds import CardKind, Label

LEAST_EXCESS_GIB = 0.01  # a config that misses only its reserve counts as infeasible too
WITHOUT_EFFECT = {
    "lora": ("lora_alpha", "alpha_pattern", "use_rslora", "start_from", "start_digest"),
    "optim": (
        "learning_rate", "loraplus_lr_ratio", "lr_schedule", "warmup_ratio", "decay_ratio", "min_lr_ratio", "weight_decay",
        "beta1", "beta2", "eps",
    ),
    "train": ("seed", "profile_steps", "max_epochs", "neftune_noise_alpha"),
}  # fmt: skip
"""Fields that change neither memory nor speed.

Planning takes up to a second, so trials that differ only in these fields share a plan.
"""


@dataclass(frozen=True)
class Fit:
    """Say whether a trial fits, and how the engine would compute it.

    plan: None if nothing is predicted or nothing fits. reason: why it does not fit. excess_gib:
    predicted need minus the memory there is, above 0 exactly if the trial does not fit. evaluation: the
    speed of a forward pass over full rows, None without a plan.
    """

    plan: ComputePlan | None = None
    reason: str | None = None
    predicted_peak_gib: float | None = None
    excess_gib: float | None = None
    evaluation: SpeedPrediction | None = None

    @property
    def fits(self) -> bool:
        return self.reason is None


UNPREDICTED = Fit()
NO_KINDS: Mapping[Label | None, Card | None] = MappingProxyType({})


def has_no_effect(path: str) -> bool:
    """Return whether memory and speed are the same for all values of this field."""
    section, _, key = path.partition(".")
    return key.startswith("train.") or key in WITHOUT_EFFECT.get(section, ())


class Feasibility:
    """Judge configs for one model on the cards and the host memory there are."""

    def __init__(
        self,
        shape: ModelShape | None,
        card: Card | None,
        host_gib: float = math.inf,
        kinds: Mapping[Label | None, Card | None] = NO_KINDS,
    ) -> None:
        """Take the model's shape and the machines.

        card: the only card, or the one with the most memory. host_gib: host memory for one trial.
        kinds: label of a node -> card, if there are several kinds. A card of None is unknown, and a
        config that fits no other card may fit that one.
        """
        self.shape, self.card, self._host_gib, self._kinds = shape, card, host_gib, dict(kinds)
        several = {kind.name: kind for kind in self._kinds.values() if kind is not None}
        self.cards = tuple(sorted(several.values(), key=lambda kind: kind.memory_gib)) or ((card,) if card else ())
        self._known: dict[tuple[str, str], Fit] = {}

    @property
    def predicts(self) -> bool:
        return self.shape is not None and self.card is not None

    def check_fit(self, config: TrainConfig) -> Fit:
        """Return whether the config fits any card, with its plan on the smallest that it fits."""
        if not self.predicts or config.train.device == "cpu":
            return UNPREDICTED
        fit = UNPREDICTED
        for card in self.cards:
            fit = self._fit_on(config, card)
            if fit.fits:
                return fit
        return fit if self.knows_all_cards else UNPREDICTED

    @property
    def knows_all_cards(self) -> bool:
        """Return False if a node's card is unknown."""
        return None not in self._kinds.values()

    def speeds(self, config: TrainConfig) -> dict[str, float]:
        """Return the predicted tokens per second on each card that the config fits, by the card's name."""
        fits = {card.name: self._fit_on(config, card) for card in self.cards}
        return {name: fit.plan.speed.tokens_per_second for name, fit in fits.items() if fit.plan is not None}

    def avoid(self, config: TrainConfig) -> tuple[Label, ...]:
        """Return the labels of the nodes whose card the config does not fit.

        The result is empty if the config fits all cards, or none.
        """
        if not self.predicts or not self.check_fit(config).fits:
            return ()
        known = {label: card for label, card in self._kinds.items() if label is not None and card is not None}
        return tuple(label for label, card in known.items() if not self._fit_on(config, card).fits)

    def _fit_on(self, config: TrainConfig, card: Card) -> Fit:
        key = _key(config), card.name
        if key not in self._known:
            self._known[key] = self._predict_fit(config, card)
        return self._known[key]

    def _predict_fit(self, config: TrainConfig, card: Card) -> Fit:
        allowed_gib = min(card.memory_gib, config.train.memory_budget_gib or card.memory_gib)
        try:
            chosen = make_compute_plan(config, self.shape, card, self._host_gib)
        except OutOfMemory as error:
            above = 0.0 if error.predicted_gib is None else error.predicted_gib - allowed_gib
            return Fit(None, error.line, error.predicted_gib, max(above, LEAST_EXCESS_GIB))
        need_gib = chosen.memory.peak_gib + chosen.memory.reserve_gib
        has_room = need_gib + chosen.evaluation_gib <= allowed_gib
        evaluation = predict_evaluation(chosen.apply(config), self.shape, card, has_room=has_room)
        return Fit(chosen, None, chosen.memory.peak_gib, min(need_gib - allowed_gib, 0.0), evaluation)


def _key(config: TrainConfig) -> str:
    """Return the values that a plan depends on, as text.

    The config's fingerprint would not do: it leaves out fields that change only memory.
    """
    values = config.model_dump(mode="json")
    for section, fields in WITHOUT_EFFECT.items():
        for field in fields:
            del values[section][field]
    values["lora"]["lora_dropout"] = config.lora.lora_dropout > 0.0
    return json.dumps(values, sort_keys=True)


def make_feasibility(card_name: str, facts: Facts, kinds: Sequence[CardKind] = ()) -> Feasibility:
    """Judge by the card that cluster.card names, or for `auto` by the cards found.

    kinds: the kinds of a cluster's cards, used for `auto` only. The host memory found counts only
    if this machine has a GPU: otherwise trials run on another host.
    """
    model, found = facts.shape, facts.card
    here = math.inf if found is None or facts.host_gib is None else facts.host_gib
    card = _card(card_name, found)
    if card_name != "auto" or not any(kind.card for kind in kinds):
        return Feasibility(model, card and _with_rates(card, card_name, found), here)
    cards = {kind.label: _with_rates(_as_found(kind.card, card, found), card_name, found) for kind in kinds}
    return Feasibility(model, max(filter(None, cards.values()), key=lambda each: each.memory_gib), here, cards)


def _with_rates(card: Card | None, card_name: str, found: VisibleCard | None) -> Card | None:
    """Return the card with the rates that are known of it; a card of this machine has its own."""
    is_here = card is not None and found is not None and card_name == "auto" and card.name == found.name
    return card and with_known_rates(card, is_here)


def _as_found(card: Card | None, found: Card | None, visible: VisibleCard | None) -> Card | None:
    """Return a cluster's card. If the driver has the same card, use the memory that it reports."""
    same = card is not None and visible is not None and match_card(visible.name) == card
    return found if same else card


def _card(name: str, found: VisibleCard | None) -> Card | None:
    """Return the card of that name; for `auto`, the card found, with the memory it reports."""
    if name != "auto":
        return CARDS[name]
    if found is None:
        return None
    return found_card(found.name, found.memory_gib)
