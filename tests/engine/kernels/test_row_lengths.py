"""What DoRA needs of packed and plain weights: lengths of the rows of W + scaling * B A, sums of W times P, rows times factors.

Shape letters: O output features, D input features, R rank.
"""

from types import SimpleNamespace

import pytest
import torch

from engine.errors import EngineError
from engine.kernels import ops
from tests.support.kernel_checks import DEVICE, draw
from tests.support.kernel_checks import implementation as implementation  # runs on kernel and reference


def packed(weight_OD, nested, block=64):
    functional = pytest.importorskip("bitsandbytes.functional")
    data, state = functional.quantize_4bit(weight_OD, quant_type="nf4", compress_statistics=nested, blocksize=block)
    return ops.nf4_state(SimpleNamespace(data=data, quant_state=state)), functional.dequantize_4bit(data, state)


def lengths(weight_OD, a_RD, b_OR, scaling):
    return torch.linalg.norm(weight_OD.double() + scaling * b_OR.double() @ a_RD.double(), dim=1)


# Rows and tiles of whole blocks, a partial tile of them, blocks across rows, rows that begin inside a byte.
@pytest.mark.parametrize(("shape", "rank", "nested"), [
    ((48, 512), 16, True), ((20, 320), 70, True), ((20, 320), 3, False), ((65, 66), 4, True), ((7, 131), 1, False),
])  # fmt: skip
def test_a_packed_weight_s_rows_have_their_lengths(shape, rank, nested):
    state, weight = packed(draw(*shape, seed=1, scale=0.05), nested)
    a, b = draw(rank, shape[1], seed=2, scale=0.1), draw(shape[0], rank, seed=3, scale=0.1)
    right = lengths(weight, a, b, 2.0)
    torch.testing.assert_close(ops.row_lengths(state, a, b, 2.0).double(), right, rtol=2e-6, atol=0)
    out = torch.zeros(shape[0] + 2, device=DEVICE)[1:-1]
    assert ops.row_lengths(state, a.bfloat16(), b, 2.0, out) is out
    torch.testing.assert_close(out.double(), right, rtol=2e-3, atol=0)
    assert not torch.allclose(out.double(), lengths(weight, a, b, 2.1), rtol=2e-3)
    # without a term they are those of W alone, to the last bit, whatever A is
    zeros = torch.zeros_like(b)
    assert torch.equal(ops.row_lengths(state, a, zeros, 2.0), ops.row_lengths(state, -a, zeros, 1.0))


@pytest.mark.parametrize("block", [64, 512])  # the second is wider than a tile
def test_other_sizes_of_blocks(block):
    state, weight = packed(draw(18, 1024, scale=0.05), True, block)
    a, b = draw(4, 1024, seed=2, scale=0.1), draw(18, 4, seed=3, scale=0.1)
    torch.testing.assert_close(ops.row_lengths(state, a, b, 0.5).double(), lengths(weight, a, b, 0.5), rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_weight_s_rows_have_their_lengths(dtype):
    weight, a, b = draw(33, 300, dtype=dtype, scale=0.1), draw(5, 300, seed=2, scale=0.1), draw(33, 5, seed=3, scale=0.1)
    torch.testing.assert_close(ops.row_lengths(weight, a, b, 1.5).double(), lengths(weight, a, b, 1.5), rtol=2e-6, atol=0)


@pytest.mark.parametrize("shape", [(40, 576), (9, 66), (7, 131)])
def test_sums_of_a_weight_times_another_matrix_over_some_of_its_rows(shape):
    state, weight = packed(draw(*shape, seed=1), True)
    p, out = draw(5, shape[1], seed=2), torch.zeros(5, device=DEVICE)
    for first in (0, 2):
        right = (weight[first : first + 5].double() * p.double()).sum(1)
        for given in (state, weight.bfloat16(), weight):
            ops.row_dots(given, p, first, out)
            slack = 1e-2 if isinstance(given, torch.Tensor) and given.dtype == torch.bfloat16 else 2e-6
            torch.testing.assert_close(out.double(), right, rtol=0, atol=slack * shape[1] ** 0.5)
    with pytest.raises(EngineError, match="row_dots: P "):
        ops.row_dots(state, p, shape[0] - 4, out)


@pytest.mark.parametrize("shape", [(40, 576), (9, 66)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_times_factors_are_rounded_once(shape, dtype):
    state, weight = packed(draw(*shape, seed=1), True)
    factors = draw(shape[0], seed=3)
    ours = ops.dequantize_nf4(state, dtype, factors_O=factors)
    rounding = 2**-7 if dtype == torch.bfloat16 and shape[1] % 64 else 2**-8 if dtype == torch.bfloat16 else 3e-7
    torch.testing.assert_close(ours.double(), weight.double() * factors[:, None].double(), rtol=rounding, atol=0)
    with pytest.raises(EngineError, match="dequantize_nf4: factors "):
        ops.dequantize_nf4(state, dtype, factors_O=factors[1:])


def test_wrong_layouts_are_refused():
    weight, a, b = draw(6, 8), draw(2, 8), draw(6, 2)
    for args in ((weight, a[:, :6], b), (weight, a, b.bfloat16()), (weight.t(), a, b), (weight, a, draw(2, 6).t())):
        with pytest.raises(EngineError, match="row_lengths: "):
            ops.row_lengths(*args, 1.0)
