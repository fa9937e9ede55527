"""Choose how the int8 matmul works for a card and a shape: tile, warps, stages, and how it loads."""

from __future__ import annotations

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
HOPPER = Tile(128, 256, 128, 8, 3, described=True, halves=True)
HOPPER_POINTERS = Tile(128, 256, 128, 8, 3)
AMPERE = Tile(128, 128, 128, 8, 3)  # 164 KiB of shared memory
SMALL_SHARED = Tile(128, 128, 64, 4, 3)  # Ada and consumers' Ampere and Blackwell have 100 KiB

# What the benchmark times on Hopper. The first of each kind differs from the others in one thing.
_DESCRIBED = replace(HOPPER, halves=False, flat=False)
CANDIDATES = [
    HOPPER,
    replace(HOPPER, stages=4),
    replace(HOPPER, height=16),
    _DESCRIBED,
    replace(_DESCRIBED, stages=4),
    replace(_DESCRIBED, stages=4, halves=True),
    replace(_DESCRIBED, per_processor=1024),
    replace(_DESCRIBED, n=128, warps=4, per_processor=2),
    replace(_DESCRIBED, n=128, warps=4, per_processor=1024),
    replace(_DESCRIBED, n=128, warps=4, per_processor=2, flat=True, halves=True),
    replace(_DESCRIBED, t=256, n=128, stages=4, halves=True),
    replace(HOPPER, t=256, n=128),
    HOPPER_POINTERS,
    replace(HOPPER_POINTERS, stages=4),
    Tile(128, 128, 128, 4, 3),
    AMPERE,
    replace(AMPERE, stages=4),
]


def choose_tile(capability: int, processors: int, num_tokens: int, num_columns: int, can_describe: bool) -> Tile:
    """Return the tile for a card and a shape.

    capability: 10 * major + minor, 0 for the interpreter. processors: the card's multiprocessors.
    can_describe: the operands are aligned as descriptors need them.
    """
    if capability == 0:
        return INTERPRETED
    if 90 <= capability < 100:
        large = HOPPER if can_describe else HOPPER_POINTERS
    else:
        large = AMPERE if capability == 80 else SMALL_SHARED
    for tile in (large, Tile(128, 128, large.k, 4, 3)):
        if -(-num_tokens // tile.t) * -(-num_columns // tile.n) >= processors:
            return tile
    return Tile(64, 64, 64, 4, 4)  # too few tiles for all multiprocessors: smaller ones
