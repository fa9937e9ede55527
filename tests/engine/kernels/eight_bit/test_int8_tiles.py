"""Every way to launch the int8 matmul gives what its definition gives, and the choice suits card and shape."""

import itertools

import pytest
import torch

from engine.kernels.eight_bit import int8_reference
from engine.kernels.eight_bit.int8_ops import Int8Rows
from engine.kernels.eight_bit.int8_tiles import CANDIDATES, Tile, choose_tile
from engine.kernels.ops import LowRank
from tests.support.kernel_checks import DEVICE, as_good_as_torch, draw
from tests.support.kernel_checks import implementation as implementation  # runs on kernel and reference

pytest.importorskip("triton")
WAYS = [
    Tile(64, 64, 64, 4, 3),
    Tile(64, 128, 64, 4, 2, halves=True),
    Tile(128, 64, 64, 4, 3, height=2),
    Tile(64, 64, 64, 4, 3, described=True),
    Tile(64, 128, 64, 4, 3, described=True, halves=True, per_processor=2, height=2),
    Tile(64, 64, 64, 4, 3, described=True, flat=False),
]
SHAPES = [(64, 64, 64), (200, 136, 208), (300, 72, 144)]  # T, N, K


def operands(sizes, rank=12):
    t, n, k = sizes
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(-127, 128, (rows, k), generator=generator, dtype=torch.int8).to(DEVICE) for rows in (t, n)]
    a, b = (Int8Rows(rows, draw(rows.shape[0], seed=i).abs() + 0.01) for i, rows in enumerate(codes))
    low, low_b = (draw(rows, rank, dtype=torch.bfloat16, seed=5, scale=30.0) for rows in (t, n))
    return a, b, LowRank(low, low_b)


@pytest.fixture
def launch_matmul(implementation):
    if implementation == "reference":
        pytest.skip("a launch has no reference")
    from engine.kernels.eight_bit.int8_matmul import launch_matmul

    return launch_matmul


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("tile", WAYS)
def test_every_way_gives_the_same_sums(tile, sizes, launch_matmul):
    if tile.described and DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("descriptors need Hopper")
    a, b, term = operands(sizes)
    exact = int8_reference.matmul(a, b, torch.float32, None, None)
    assert torch.equal(launch_matmul(a, b, torch.float32, None, None, tile), exact)
    sums = (a.codes_NK.double() @ b.codes_NK.double().t()) * a.scale_N[:, None].double() * b.scale_N.double()
    truth = sums + term.low_TR.double() @ term.b_FR.double().t()
    plain = int8_reference.matmul(a, b, torch.bfloat16, term, None)
    assert as_good_as_torch(launch_matmul(a, b, torch.bfloat16, term, None, tile), plain, truth)
    assert not as_good_as_torch(launch_matmul(a, b, torch.bfloat16, None, None, tile), plain, truth)


# compute capability, multiprocessors, KiB of shared memory that a program may take
CARDS = [(80, 108, 163), (86, 82, 99), (89, 128, 99), (90, 132, 227), (100, 148, 227), (120, 170, 99)]


def shared_kib(tile):
    """Return what the stages of both operands take, and a tile of bf16 outputs if loads go on while it is written."""
    outputs = 2 * tile.t * tile.n // (2 if tile.halves else 1) if tile.described and tile.flat else 0
    return (tile.stages * (tile.t + tile.n) * tile.k + outputs) / 1024


@pytest.mark.parametrize(("card", "processors", "limit"), CARDS)
def test_a_tile_fits_the_card_and_gives_work_to_all_of_it(card, processors, limit, implementation):
    for t, n, k in ((4096, 28672, 4096), (4096, 4096, 28672), (2048, 576, 1536), (64, 64, 9000)):
        for can_describe, has_term in itertools.product((False, True), repeat=2):
            tile = choose_tile(card, processors, t, n, k, can_describe, has_term)
            assert max(shared_kib(tile), tile.per_processor * tile.stages * (tile.t + tile.n) * tile.k / 1024) <= limit
            assert not tile.described or (can_describe and 90 <= card < 100)
            tiles = -(-t // tile.t) * -(-n // tile.n)
            assert tiles >= processors or tile.t == tile.n == 64
    large = choose_tile(card, processors, 4096, 28672, 4096, True, False)
    assert large.t * large.n > 64 * 64 and large.described == (card == 90)
    assert choose_tile(card, processors, 64, 64, 64, True, False).t == 64


def test_candidates_are_distinct_and_fit_hopper(implementation):
    assert len(set(CANDIDATES)) == len(CANDIDATES)
    assert all(shared_kib(tile) <= 227 for tile in CANDIDATES)
