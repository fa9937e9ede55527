"""Choose how the int8 matmul works for a card and a shape: tile, warps, stages, and how it loads."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tile:
    """Hold one way to launch the int8 matmul: t by n outputs a tile, k of the reduction at a time."""

    t: int
    n: int
    k: int
    warps: int
    stages: int
    described: bool = False  # loads by descriptors, with programs that stay
    per_processor: int = 1  # programs that stay on one multiprocessor
    flat: bool = True
    halves: bool = False
    height: int = 8


INTERPRETED = Tile(64, 64, 64, 4, 3)
# Hopper. Two small programs on a multiprocessor write one's outputs while the other multiplies. A long
# reduction writes seldom, and large tiles read less. One loop for both has too few registers for a term.
HOPPER = Tile(128, 128, 128, 4, 3, described=True, per_processor=2)
HOPPER_TERM = replace(HOPPER, flat=False)
HOPPER_LONG, LONG = Tile(128, 256, 128, 8, 4, described=True, flat=False), 8192
HOPPER_POINTERS = Tile(128, 128, 128, 4, 3)
AMPERE = Tile(128, 128, 128, 8, 3)  # 164 KiB of shared memory
SMALL_SHARED = Tile(128, 128, 64, 4, 3)  # Ada and consumers' Ampere and Blackwell have 100 KiB
SMALL = Tile(64, 64, 64, 4, 4)

# What the self-calibration times on cards other than Hopper, each where it fits
POINTER_TILES = [
    AMPERE,
    SMALL_SHARED,
    replace(AMPERE, n=256),
    Tile(128, 256, 64, 8, 3),
    Tile(256, 128, 64, 8, 3),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 64, 128, 4, 3),
]
Use = tuple[bool, bool]  # the sum is LONG, and a low-rank term is added
USES = {"short": (False, False), "short, term": (False, True), "long": (True, False), "long, term": (True, True)}
_own: dict[tuple[int, Use], Tile] = {}  # by capability: a process computes on one card

# What the benchmark times, on Hopper
CANDIDATES = [
    HOPPER,
    HOPPER_TERM,
    replace(HOPPER, halves=True),
    replace(HOPPER, flat=False, per_processor=1024),
    HOPPER_LONG,
    replace(HOPPER_LONG, stages=3),
    replace(HOPPER_LONG, per_processor=1024),
    replace(HOPPER_LONG, flat=True, halves=True),
    replace(HOPPER_LONG, flat=True, halves=True, height=4),
    replace(HOPPER_LONG, flat=True, halves=True, stages=3),
    replace(HOPPER_LONG, t=256, n=128, flat=True, halves=True, stages=3),
    HOPPER_POINTERS,
    AMPERE,
    replace(AMPERE, n=256),
]


def is_tuned(capability: int) -> bool:
    """Return True if the calibration times tiles for such cards. On Hopper they are chosen by hand."""
    return capability > 0 and not 90 <= capability < 100


def use_tiles(capability: int, tiles: Mapping[str, Tile]) -> None:
    """Take these tiles on cards of this capability from now on, by the names of USES; others stay as they are.

    A tile changes how fast a product is. The sum over codes is exact with each.
    """
    _own.update({(capability, USES[name]): tile for name, tile in tiles.items()})
    choose_tile.cache_clear()


@functools.lru_cache(4096)
def choose_tile(
    capability: int, processors: int, num_tokens: int, num_columns: int, reduced: int, can_describe: bool, has_term: bool
) -> Tile:
    """Return the tile for a card and a product of [num_tokens, reduced] by [num_columns, reduced].

    capability: 10 * major + minor, 0 for the interpreter. processors: the card's multiprocessors.
    can_describe: the operands are aligned as descriptors need them. has_term: a low-rank term is added.
    """
    if capability == 0:
        return INTERPRETED
    if 90 <= capability < 100 and can_describe:
        short = HOPPER_TERM if has_term else HOPPER
        choices = [HOPPER_LONG, short] if reduced >= LONG else [short]
    elif 90 <= capability < 100:
        choices = [HOPPER_POINTERS]
    else:
        usual = AMPERE if capability == 80 else SMALL_SHARED
        choices = [_own.get((capability, (reduced >= LONG, has_term)), usual)]
    for tile in choices:
        if -(-num_tokens // tile.t) * -(-num_columns // tile.n) >= processors:
            return tile
    return SMALL  # the others are too few for all multiprocessors
