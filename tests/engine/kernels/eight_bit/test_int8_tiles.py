"""Every way to launch the int8 matmul gives what its definition gives, and the choice suits card and shape."""

import pytest
import torch

from engine.kernels.eight_bit import int8_reference
from engine.kernels.eight_bit.int8_ops import Int8Rows
from engine.kernels.eight_bit.int8_tiles import Tile
from engine.kernels.ops import LowRank
from tests.support.kernel_checks import DEVICE, as_good_as_torch, draw, leave_to_a_child
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


leave_to_a_child(globals(), "test_eight_bit_tiles_in_triton_s_interpreter")
