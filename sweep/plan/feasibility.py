"""Whether a trial fits the card, asked before it is started: the engine's own plan, made in the driver. No torch.

Nothing is predicted for a CPU, for a model of unknown shape and without a card; everything then counts as fitting.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from engine.answers import Facts, VisibleCard
from engine.config.trial import TrainConfig
from engine.errors import OutOfMemory
from engine.planning.cards import CARDS, Card, found_card, match_card
from engine.planning.model_shape import ModelShape
from engine.planning.planner import ComputePlan, make_compute_plan
from sweep.cluster.card_kinds import CardKind, Label

LEAST_EXCESS_GIB = 0.01  # what does not fit for want of its reserve alone violates the constraint too
WITHOUT_EFFECT = {
    "lora": ("lora_alpha", "use_rslora"),
    "optim": ("learning_rate", "lr_schedule", "warmup_ratio", "min_lr_ratio", "weight_decay", "beta1", "beta2", "eps"),
    "train": ("seed", "profile_steps"),
}
"""Fields that change neither memory nor speed: a plan takes up to a second, and trials that differ in these alone share one."""


@dataclass(frozen=True)
class Fit:
    """plan: how the trial would be computed, None where nothing is predicted or nothing fits. reason: why it does not fit.

    excess_gib: predicted need above what there is; above 0 exactly where it does not fit.
    """

    plan: ComputePlan | None = None
    reason: str | None = None
    predicted_peak_gib: float | None = None
    excess_gib: float | None = None

    @property
    def fits(self) -> bool:
        return self.reason is None


UNPREDICTED = Fit()
NO_KINDS: Mapping[Label | None, Card | None] = MappingProxyType({})


def has_no_effect(path: str) -> bool:
    """Whether memory and speed are the same for all values of this field."""
    section, key = path.split(".")
    return key in WITHOUT_EFFECT.get(section, ())


class Feasibility:
    """Judges configs for one model on the cards there are, in machines with so much host memory for a trial."""

    def __init__(
        self,
        shape: ModelShape | None,
        card: Card | None,
        host_gib: float = math.inf,
        kinds: Mapping[Label | None, Card | None] = NO_KINDS,
    ) -> None:
        """card: the only one, or that with the most memory. kinds: where there are several, the label of their nodes -> card;
        no card where nobody knows which it is: what fits none of the others may yet fit that one."""
        self.shape, self.card, self._host_gib, self._kinds = shape, card, host_gib, dict(kinds)
        several = {kind.name: kind for kind in self._kinds.values() if kind is not None}
        self.cards = tuple(sorted(several.values(), key=lambda kind: kind.memory_gib)) or ((card,) if card else ())
        self._known: dict[tuple[str, str], Fit] = {}

    @property
    def predicts(self) -> bool:
        return self.shape is not None and self.card is not None

    def check_fit(self, config: TrainConfig) -> Fit:
        """Whether the config fits any card, and how it would be computed on the smallest that it fits."""
        if not self.predicts or config.train.device == "cpu":
            return UNPREDICTED
        fit = UNPREDICTED
        for card in self.cards:
            fit = self._fit_on(config, card)
            if fit.fits:
                return fit
        return UNPREDICTED if None in self._kinds.values() else fit

    def avoid(self, config: TrainConfig) -> tuple[Label, ...]:
        """Labels of the nodes whose card it does not fit; none where it fits all, or none."""
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
        return Fit(chosen, None, chosen.memory.peak_gib, min(need_gib - allowed_gib, 0.0))


def _key(config: TrainConfig) -> str:
    """What a plan depends on. Not the config's fingerprint, which leaves out what changes memory and nothing else."""
    values = config.model_dump(mode="json")
    for section, fields in WITHOUT_EFFECT.items():
        for field in fields:
            del values[section][field]
    values["lora"]["lora_dropout"] = config.lora.lora_dropout > 0.0
    return json.dumps(values, sort_keys=True)


def make_feasibility(card_name: str, facts: Facts, kinds: Sequence[CardKind] = ()) -> Feasibility:
    """Take the card by its name in cluster.card, or the cards found. kinds: of a cluster's cards, which count where no card is
    named. The host memory found counts where there is a GPU: elsewhere trials have another host."""
    model, found = facts.shape, facts.card
    here = math.inf if found is None or facts.host_gib is None else facts.host_gib
    card = _card(card_name, found)
    if card_name != "auto" or not any(kind.card for kind in kinds):
        return Feasibility(model, card, here)
    cards = {kind.label: _as_found(kind.card, card, found) for kind in kinds}
    return Feasibility(model, max(filter(None, cards.values()), key=lambda each: each.memory_gib), here, cards)


def _as_found(card: Card | None, found: Card | None, visible: VisibleCard | None) -> Card | None:
    """A cluster's card, with the memory that the driver's own card of that kind says it has."""
    same = card is not None and visible is not None and match_card(visible.name) == card
    return found if same else card


def _card(name: str, found: VisibleCard | None) -> Card | None:
    """The card by that name; for auto, the one found, with the memory it says it has."""
    if name != "auto":
        return CARDS[name]
    if found is None:
        return None
    return found_card(found.name, found.memory_gib)
