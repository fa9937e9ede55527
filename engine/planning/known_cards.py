"""Find what is known about a card's speed: measured here, measured on its kind, or its data sheet.

Measurements lie in the cache folder (`cards/`), one file for each stack of card, driver, versions
and host. Those that come with the program lie next to this file. No torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from engine.errors import EngineError
from engine.planning.cards import CARDS, Card, match_card
from engine.planning.measured_card import CardStack, MeasuredCard
from engine.system.shared_cache import cache_root

KEPT = Path(__file__).with_name("kept_cards")
HERE, KIND = "measured here", "measured on a card of this kind"
SHEET, GUESS = "extrapolated from the data sheet", "guessed, as for any card that is not known"
_warned: set[str] = set()


def stored_folder() -> Path:
    """Return the cache's folder of measurements, which may not exist yet."""
    return cache_root() / "cards"


def stored_file(stack: CardStack) -> Path:
    """Return the file of a stack's measurement, which may not exist yet."""
    name = re.sub(r"[^a-z0-9]+", "-", stack.card.lower()).strip("-")[:60]
    return stored_folder() / f"{name}-{stack.digest}.json"


def measured_here(card: str) -> MeasuredCard | None:
    """Return the measurement of this card in this machine with these versions, if there is one."""
    stack = CardStack.here(card)
    found = _read(stored_file(stack))
    return found if found is not None and found.stack == stack else None


def with_known_rates(card: Card, here: bool = False) -> Card:
    """Return the card with the best rates that are known, and where they come from.

    here: the card is in this machine, so that a measurement of today's versions is its own.
    """
    own = measured_here(card.name) if here else None
    if own is not None:
        return replace(card, rates=own.rates, measured=HERE)
    near = next(_of_kind(card.name, stored_folder()), None) or next(_of_kind(card.name, KEPT), None)
    return card if near is None else replace(card, rates=near.rates, measured=f"{KIND} ({near.described()})")


def speed_basis(card: Card) -> str:
    """Return in a few words what the speeds predicted for the card rest on."""
    known = card.name in CARDS or match_card(card.name) is not None
    return card.measured or (SHEET if known else GUESS)


def _of_kind(name: str, folder: Path) -> Iterator[MeasuredCard]:
    """Yield the folder's measurements of such cards, the latest day first."""
    found = [one for path in sorted(folder.glob("*.json")) if (one := _read(path)) is not None]
    yield from sorted((one for one in found if _kind(one.stack.card) == _kind(name)), key=lambda one: one.day, reverse=True)


def _kind(name: str) -> str:
    known = match_card(name)
    return name if known is None else known.name


def _read(path: Path) -> MeasuredCard | None:
    """Return the file's measurement; a damaged one is named once, and counts as missing."""
    if not path.is_file():
        return None
    try:
        return MeasuredCard.read(path)
    except EngineError as error:
        if str(path) not in _warned:
            _warned.add(str(path))
            print(f"WARNING: {error}; it is not used", file=sys.stderr, flush=True)
        return None
