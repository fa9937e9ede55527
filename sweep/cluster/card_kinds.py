"""Find which cards an existing cluster has, and keep trials off cards that they do not fit.

Ray labels each node with its card, as NVML names it (`ray.io/accelerator-type`: A10G,
GeForce-RTX-3090). The label may be missing, or say too little (an A100 has 40 or 80 GB). Then the
user's own label says it: `ray start --labels card=a100-80`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import InputError
from engine.planning.cards import CARDS, Card, match_card

OWN_LABEL, RAYS_LABEL = "card", "ray.io/accelerator-type"
Label = tuple[str, str]


@dataclass(frozen=True)
class CardKind:
    """Count the cards of one kind.

    label: the label of the nodes that have them, None if the nodes have none. card: None if it is
    unknown.
    """

    label: Label | None
    num_gpus: int
    card: Card | None

    def describe(self) -> str:
        """Return a text such as `2 x rtx3090 (23.6 GiB)`."""
        if self.card is None:
            return f"{self.num_gpus} x {self.label[1] if self.label else 'a card without a label'} (not known)"
        return f"{self.num_gpus} x {self.card.name} ({self.card.memory_gib:.1f} GiB)"


def card_kinds(nodes: Iterable[Mapping[str, Any]]) -> tuple[CardKind, ...]:
    """Count the cluster's GPUs by kind, largest memory first.

    nodes: as `ray.nodes()` returns them. Raises InputError if a user's label names no card.
    """
    counts: Counter[Label | None] = Counter()
    for node in nodes:
        num_gpus = int(node["Resources"].get("GPU", 0))
        if node["Alive"] and num_gpus:
            labels = node.get("Labels") or {}
            counts[next(((key, labels[key]) for key in (OWN_LABEL, RAYS_LABEL) if key in labels), None)] += num_gpus
    kinds = [CardKind(label, num_gpus, _card(label)) for label, num_gpus in counts.items()]
    return tuple(sorted(kinds, key=lambda kind: (-(kind.card.memory_gib if kind.card else 0.0), kind.label or ())))


def selector(avoid: Iterable[Label]) -> dict[str, str]:
    """Return Ray's label selector for nodes with none of these labels.

    For example, (card, l4) and (card, a10) give {"card": "!in(a10,l4)"}.
    """
    values: dict[str, list[str]] = {}
    for key, value in sorted(avoid):
        values.setdefault(key, []).append(value)
    return {key: f"!in({','.join(names)})" for key, names in values.items()}


def _card(label: Label | None) -> Card | None:
    if label is None:
        return None
    key, value = label
    if key == OWN_LABEL:
        if value not in CARDS:
            raise InputError("a node's label card", value, f"must be one of {', '.join(CARDS)}")
        return CARDS[value]
    return match_card(value.replace("-", " ")) or CARDS.get(value.lower())
