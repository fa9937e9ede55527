"""Choose how the int8 matmul works for a card and a shape: tile, warps, stages, and how it loads."""

from __future__ import annotations

from dataclasses import dataclass


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
    special: bool = False
    halves: bool = False
    height: int = 8


def choose_tile(capability: int, num_tokens: int, num_columns: int, reduced: int, can_describe: bool) -> Tile:
    """Return the tile for a card (10 * major + minor, 0 for the interpreter) and a shape.

    can_describe: the operands are aligned as descriptors need them.
    """
    return Tile(64, 64, 64, 4, 3)
