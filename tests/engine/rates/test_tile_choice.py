"""The calibration takes the tiles that win by more than noise, leaves out those that do not fit, and training takes them."""

from __future__ import annotations

import itertools

import pytest
import torch

from engine.kernels.eight_bit import int8_tiles
from engine.kernels.eight_bit.int8_ops import Int8Rows
from engine.kernels.eight_bit.int8_tiles import POINTER_TILES, SMALL_SHARED, USES, Tile, choose_tile, is_tuned, use_tiles
from engine.rates import kernel_rates, tile_choice
from engine.rates.widths import Widths

SMALL, LARGE = Widths("small", "tiny", 64, 128, 4, 2, 16, 512, 64), Widths("large", "tiny", 64, 256, 4, 2, 16, 512, 64)
AMPERE_CARD = (86, 82, 4096, 4096, 4096, False)


@pytest.fixture(autouse=True)
def own_tiles(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(int8_tiles, "_own", {})
    choose_tile.cache_clear()
    yield
    choose_tile.cache_clear()


def tuned(monkeypatch: pytest.MonkeyPatch, seconds, card: int = 86) -> dict[str, Tile]:
    """Return what a card finds whose products take these seconds: of a tile, or None, and whether a term is added."""
    asked = []

    def product(a: Int8Rows, b: Int8Rows, term, tile: Tile | None) -> None:
        asked.append((tile, term is not None))

    def timer(call) -> float:
        call()
        found = seconds(*asked[-1])
        if found is None:
            raise ValueError("out of resource: shared memory")
        return found

    monkeypatch.setattr(tile_choice, "_product", product)
    monkeypatch.setattr(tile_choice, "capability", lambda tensor: card)
    monkeypatch.setattr(tile_choice, "LONG", 256)
    return tile_choice.tune_tiles(timer, kernel_rates.drawing(torch.device("cpu"), torch.float32), [SMALL, LARGE])


def test_a_tile_wins_by_more_than_noise_and_only_if_it_fits(monkeypatch):
    first, second, *_ = POINTER_TILES

    def seconds(tile: Tile | None, has_term: bool) -> float | None:
        if tile == first:
            return None  # it does not fit
        return {None: 1.0, second: 0.9 if has_term else 0.98}.get(tile, 1.1)

    assert tuned(monkeypatch, seconds) == {"short, term": second, "long, term": second}
    assert choose_tile(*AMPERE_CARD, has_term=True) == second and choose_tile(*AMPERE_CARD, has_term=False) == SMALL_SHARED
    assert choose_tile(89, 82, 4096, 4096, 4096, False, True) == SMALL_SHARED  # another kind of card


@pytest.mark.parametrize("card", [0, 90])
def test_hopper_and_the_cpu_are_not_tuned(card, monkeypatch):
    assert tuned(monkeypatch, lambda *_: pytest.fail("nothing is timed"), card) == {} and not is_tuned(card)


def test_a_product_with_too_few_tiles_for_the_card_takes_small_ones_all_the_same():
    use_tiles(86, dict.fromkeys(USES, Tile(128, 256, 64, 8, 3)))
    for reduced, has_term in itertools.product((64, 8192), (False, True)):
        assert choose_tile(86, 82, 4096, 4096, reduced, False, has_term).n == 256
        assert choose_tile(86, 82, 64, 64, reduced, False, has_term).n == 64
    assert choose_tile(90, 132, 4096, 4096, 64, True, False).described
