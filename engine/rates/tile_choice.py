"""Choose the tiles of products in INT8 by timing them: on cards that nobody has tuned by hand."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.kernels.eight_bit import int8_ops
from engine.kernels.eight_bit.card_facts import capability
from engine.kernels.eight_bit.int8_ops import Int8Rows
from engine.kernels.eight_bit.int8_tiles import LONG, POINTER_TILES, USES, Tile, is_tuned, use_tiles
from engine.kernels.ops import LowRank
from engine.rates.kernel_rates import RANK, Draw
from engine.rates.timing import Timer
from engine.rates.widths import Widths

GAIN = 1.03  # a tile must be so many times as fast as the usual one, or noise would decide


def tune_tiles(timer: Timer, draw: Draw, all_widths: Iterable[Widths]) -> dict[str, Tile]:
    """Return the tiles that beat the usual ones on this card, by the names of USES, and use them from now on.

    Empty on Hopper and on the CPU. A tile that does not fit the card is left out.
    """
    card = capability(draw(1))
    if not is_tuned(card):
        return {}
    found = {}
    for name, (is_long, has_term) in USES.items():
        shapes = _shapes(all_widths, is_long)
        if not shapes:
            continue
        usual = _seconds(timer, draw, shapes, has_term, None)
        tried = {tile: _seconds(timer, draw, shapes, has_term, tile) for tile in POINTER_TILES}
        best = min(tried, key=tried.__getitem__)
        if GAIN * tried[best] < usual:
            found[name] = best
    use_tiles(card, found)
    return found


def _shapes(all_widths: Iterable[Widths], is_long: bool) -> list[tuple[int, int, int]]:
    """Return tokens, columns and length of each product of a layer whose sum is long, or is not."""
    both = [
        (widths.tokens, columns, reduced)
        for widths in all_widths
        for sizes in widths.products.values()
        for columns, reduced in (sizes, sizes[::-1])
    ]
    return [shape for shape in both if (shape[2] >= LONG) == is_long]


def _seconds(timer: Timer, draw: Draw, shapes: list[tuple[int, int, int]], has_term: bool, tile: Tile | None) -> float:
    """Return the seconds of all products with this tile, the usual one for None; infinity if it does not fit."""
    seconds = 0.0
    for tokens, columns, reduced in shapes:
        a, b = (int8_ops.quantize_rows(draw(rows, reduced)) for rows in (tokens, columns))
        term = LowRank(draw(tokens, RANK), draw(columns, RANK)) if has_term else None
        try:
            seconds += timer(lambda a=a, b=b, term=term: _product(a, b, term, tile))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # too little shared memory, or too few registers: Triton's versions raise several classes
            return float("inf")
    return seconds


def _product(a: Int8Rows, b: Int8Rows, term: LowRank | None, tile: Tile | None) -> Tensor:
    dtype = torch.bfloat16 if term is None else term.b_FR.dtype
    if tile is None:
        return int8_ops.matmul(a, b, dtype, term)
    from engine.kernels.eight_bit.int8_matmul import launch_matmul  # it needs Triton

    return launch_matmul(a, b, dtype, term, None, tile)
