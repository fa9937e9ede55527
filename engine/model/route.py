"""Say how a base model is computed: which layers, which attention, which loss, which rows."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from engine.layers.attention import NAME as PACKED


@dataclass(frozen=True)
class Route:
    """One way to compute a model.

    - fused: known decoder layers are swapped for ours.
    - attention: an entry of transformers' registry. `packed` is ours, cut at the document offsets.
    - head_loss: the loss comes from hidden states and head, in chunks; else from the model's logits.
    - shares_rows: several samples may share a row; else each has a row of its own.
    - boundaries: layers that carry a state are told where samples begin, by the keywords that
      transformers has for rows without padding.
    """

    fused: bool = True
    attention: str = PACKED
    head_loss: bool = True
    shares_rows: bool = True
    boundaries: bool = False

    @property
    def packed_attention(self) -> bool:
        return self.attention == PACKED

    @property
    def is_predicted(self) -> bool:
        """Return whether engine/memory counts what it takes: attention and logits that are never whole."""
        return self.packed_attention and self.head_loss

    def describe(self) -> str:
        """Return what is slower than on the fastest route, as the end of a line; '' if nothing is."""
        slower = {
            f"the model's own attention ({self.attention})": not self.packed_attention,
            "the model's own logits": not self.head_loss,
            "one sample a row": not self.shares_rows,
        }
        return ", ".join(text for text, applies in slower.items() if applies)


MADE_WITH = "eager"  # every model. Some families choose a class by their attention, and keep it whatever is set later
FASTEST = Route()
OWN_ATTENTIONS = ("sdpa", MADE_WITH)  # of the library, the faster one first


def routes(can_fuse: bool, own_attentions: list[str]) -> list[Route]:
    """Return the routes to try, fastest first. Without packed attention no row is shared."""
    found = [FASTEST] if can_fuse else []
    found += [Route(False), Route(False, head_loss=False)]
    own = [Route(False, name, head_loss, False) for name in own_attentions for head_loss in (True, False)]
    return found + own


@dataclass(frozen=True)
class ModelVerdict:
    """Say how to compute a model, and which layers get no adapter.

    experts: True if experts are packed in NF4, and adapters may target them. without_gradient: layers
    whose adapter would never learn. read_directly: layers whose weight the
    model's code reads itself, so that they stay as they are. not_exported: layers whose adapter PEFT
    would not load again. All are names, with `*` for numbers where all of a kind are meant.
    measures: the library's attentions whose losses are right, because they are those of MADE_WITH.
    faults: what was wrong on the faster routes. checked: False if no tiny model could be built, so
    that only the real weights can show whether the route is right.
    """

    route: Route
    without_gradient: tuple[str, ...] = ()
    read_directly: tuple[str, ...] = ()
    not_exported: tuple[str, ...] = ()
    faults: tuple[str, ...] = field(default=(), compare=False)
    checked: bool = True
    experts: bool = False
    measures: tuple[str, ...] = OWN_ATTENTIONS

    def adapts(self, name: str) -> bool:
        """Return True if the layer of this name may get an adapter."""
        left_out = {*self.without_gradient, *self.read_directly, *self.not_exported}
        return name not in left_out and pattern_of(name) not in left_out


def pattern_of(name: str) -> str:
    """Return a layer's name with `*` for each number in it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
