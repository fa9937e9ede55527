"""Dropout by a hash of the place: kernel and definition agree, and the masks look random.

Shape letters: T tokens, D features.
"""

import pytest
import torch

from engine.errors import EngineError
from engine.kernels import ops, reference
from tests.support.kernel_checks import DEVICE, DTYPES, draw
from tests.support.kernel_checks import implementation as implementation  # runs on kernel and reference

SEED = 0x123456789ABCDEF


def noise(rate, seed=SEED):
    return torch.tensor(ops.noise_of(seed, rate), device=DEVICE)


def mask(rate, stream=0, seed=SEED, shape=(64, 2100)):
    return reference.dropout(torch.ones(shape, device=DEVICE), noise(rate, seed), stream) != 0


@pytest.fixture
def definition(implementation):
    if implementation == "kernel":
        pytest.skip("the kernel drops the same elements, as the first test shows")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 1500)])
def test_kernel_and_definition_drop_the_same_elements(shape, dtype):
    x, state = draw(shape[0], shape[1] + 3, dtype=dtype)[:, : shape[1]], noise(0.3)
    ours, truth = ops.dropout(x, state, 7), reference.dropout(x, state, 7)
    assert torch.equal(ours, truth) and ours.dtype == dtype and ours.is_contiguous()
    kept = truth != 0
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(ours[kept].double(), x[kept].double() / 0.7, rtol=rounding, atol=0)
    place = x.clone()
    assert ops.dropout(place, state, 7, in_place=True) is place and torch.equal(place, ours)
    # twins: another stream, another seed, another rate
    if x.numel() > 100:
        for other in (ops.dropout(x, state, 8), ops.dropout(x, noise(0.3, SEED + 1), 7), ops.dropout(x, noise(0.31), 7)):
            assert not torch.equal(other, truth)


def test_the_rate_of_dropped_elements_is_the_one_asked_for(definition):
    for rate in (0.0, 0.05, 0.5, 0.9):
        drop = ~mask(rate)
        number, allowed = drop.numel(), 4.0
        deviation = (drop.sum().item() - rate * number) / max(1e-9, (number * rate * (1 - rate)) ** 0.5)
        assert abs(deviation) < allowed, rate
        if rate:  # the variance between rows, and between columns, is chance's: 1 within 4 deviations
            for means, count in ((drop.float().mean(1), drop.shape[1]), (drop.float().mean(0), drop.shape[0])):
                ratio = ((means - rate).square() * count / (rate * (1 - rate))).mean().item()
                assert abs(ratio - 1.0) < 4 * (2 / len(means)) ** 0.5, rate


def test_masks_of_other_places_streams_and_seeds_are_independent(definition):
    """Two fair masks agree in half of their elements, within what chance allows."""
    one = mask(0.5)
    others = [mask(0.5, stream) for stream in (1, 2, 4096)] + [mask(0.5, seed=SEED ^ bit) for bit in (1, 2, 1 << 31, 1 << 40)]
    others += [one.roll(1, 0), one.roll(1, 1), one.roll(16, 1), one.roll((1, 1), (0, 1))]
    for i, other in enumerate(others):
        share = (one == other).float().mean().item()
        assert abs(share - 0.5) < 4 * 0.5 / one.numel() ** 0.5, i
    pairs = torch.bincount((2 * one[:, ::2][:, :1050] + one[:, 1::2]).flatten().long(), minlength=4).double()
    expected = pairs.sum() / 4
    assert ((pairs - expected) ** 2 / expected).sum() < 16.3  # chi square, 3 degrees: 0.1 %


def test_what_dropout_cannot_read_is_refused():
    x = draw(4, 8)
    for bad in (torch.zeros(3, dtype=torch.int64), torch.zeros(2)):
        with pytest.raises(EngineError, match="dropout: noise"):
            ops.dropout(x, bad.to(DEVICE), 0)
    with pytest.raises(EngineError, match="dropout: x"):
        ops.dropout(x.t(), noise(0.1), 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1500)])
def test_kernel_and_definition_add_the_same_noise_within_each_row_s_bound(shape, dtype):
    x, bound = draw(shape[0], shape[1] + 3, dtype=dtype)[:, : shape[1]], torch.arange(1.0, 1 + shape[0], device=DEVICE)
    ours, truth, given = x.clone(), x.clone(), x.double()
    ops.add_noise_(ours, bound, noise(0.0), 7)
    reference.add_noise_(truth, bound, noise(0.0), 7)
    torch.testing.assert_close(ours, truth, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    zeros = torch.zeros(64, 2100, device=DEVICE)
    reference.add_noise_(zeros, torch.full((64,), 3.0, device=DEVICE), noise(0.0), 7)
    assert zeros.abs().max() < 3.0 and zeros.max() > 2.99 and abs(zeros.mean().item()) < 4 * 3 / (3 * zeros.numel()) ** 0.5
    assert zeros.var().item() == pytest.approx(3.0, rel=0.02) and zeros.unique().numel() > 0.95 * zeros.numel()
    if x.numel() > 100:  # twins: another stream, another seed
        assert ((ours.double() - given).abs() <= bound[:, None] * 1.01 + 0.02).all()
        for state, stream in ((noise(0.0), 8), (noise(0.0, SEED + 1), 7)):
            other = x.clone()
            ops.add_noise_(other, bound, state, stream)
            assert not torch.equal(other, ours)
    with pytest.raises(EngineError, match="add_noise_: bound"):
        ops.add_noise_(ours, bound.double(), noise(0.0), 7)
