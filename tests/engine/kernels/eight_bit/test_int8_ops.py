"""Compare the eight-bit kernels with fp64, and bit by bit with their definition.

`kernel_checks` says where the kernels run. Each comparison has a twin that must fail.
"""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from engine.errors import EngineError
from engine.kernels import ops
from engine.kernels.eight_bit import int8_ops, int8_reference
from engine.kernels.eight_bit.int8_ops import Int8Rows
from engine.kernels.ops import LowRank
from tests.support.kernel_checks import DEVICE, DTYPES, as_good_as_torch, draw
from tests.support.kernel_checks import implementation as implementation  # runs on kernel and reference

# In order: whole tiles; several members; words, but no whole blocks in a row; single bytes; an odd
# number of elements; one element.
WEIGHTS = [[(128, 192)], [(64, 128), (40, 128), (33, 128)], [(70, 72)], [(65, 66), (3, 66)], [(7, 131)], [(1, 1)]]
WHOLE, MEMBERS, WORDS, BYTES, ODD, ONE = WEIGHTS
NESTED = [(WHOLE, True), (MEMBERS, False), (WORDS, True), (BYTES, False), (ODD, True), (ODD, False), (ONE, True)]
ROTATED = [(WHOLE, True), ([(64, 128), (40, 128)], False), ([(5, 64)], True)]
MATMULS = [(1, 1, 1), (3, 5, 7), (64, 64, 64), (70, 130, 200), (129, 64, 256), (40, 72, 1100)]  # T, N, K


def weights(shapes, nested):
    """Return the packed states and the weights side by side, fp32; row 1 is zero if there is one."""
    functional = pytest.importorskip("bitsandbytes").functional
    states, dense = [], []
    for i, shape in enumerate(shapes):
        weight = draw(*shape, seed=i, scale=0.02 * (i + 1)) * torch.linspace(0.5, 2.0, shape[0], device=DEVICE)[:, None]
        weight[1:2] = 0.0
        data, quant = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
        states.append(ops.nf4_state(SimpleNamespace(data=data, quant_state=quant)))
        with torch.compiler.set_stance("force_eager"):  # for odd shapes it compiles its own formula, once a shape
            dense.append(functional.dequantize_4bit(data, quant).float())
    return states, torch.cat(dense)


def fits(rows, truth, slack=0.0):
    """Return True if codes are truth / scale rounded, and each row's scale is the least that holds it."""
    scale = rows.scale_N.double()[:, None]
    is_near = (rows.codes_NK.double() * scale - truth.double()).abs() <= scale * (0.5 + 1e-4 + slack)
    limit = truth.double().abs().amax(1).clamp_min(1e-30)
    return bool(is_near.all()) and torch.allclose(rows.scale_N.double() * 127, limit, rtol=1e-6 + slack, atol=0.0)


def hadamard(groups):
    """Return the rotation of `groups` groups of 64 elements, by its definition, fp64."""
    h = torch.tensor([[(-1.0) ** (i & j).bit_count() / 8 for j in range(64)] for i in range(64)], dtype=torch.float64)
    return torch.block_diag(*[h] * groups).to(DEVICE)


def poison(states):
    """Change one element of the first weight."""
    states[0].packed[0] ^= 0x70


@pytest.mark.parametrize(("shapes", "nested"), NESTED)
def test_unpacked_codes_are_the_dequantised_weight_rounded_and_bit_equal_to_their_definition(shapes, nested):
    states, dense = weights(shapes, nested)
    scales, expected = int8_ops.weight_scales(states), int8_reference.weight_scales(states, False)
    assert torch.equal(scales.row_O, expected.row_O) and torch.equal(scales.column_D, expected.column_D)
    rows, columns = int8_ops.unpack_rows(states, scales), int8_ops.unpack_columns(states, scales)
    assert rows.codes_NK.is_contiguous() and columns.codes_NK.is_contiguous()
    assert fits(rows, dense) and fits(columns, dense.t())
    for ours, unpack in ((rows, int8_reference.unpack_rows_), (columns, int8_reference.unpack_columns_)):
        plain = torch.empty_like(ours.codes_NK)
        unpack(states, scales, plain)
        assert torch.equal(ours.codes_NK, plain)
    poison(states)
    assert not torch.equal(int8_ops.unpack_rows(states, scales).codes_NK, rows.codes_NK)
    assert not torch.equal(int8_ops.unpack_columns(states, scales).codes_NK, columns.codes_NK)


@pytest.mark.parametrize("shapes", [MEMBERS, WORDS, BYTES])
def test_a_row_of_zeros_has_zero_codes(shapes):
    states, dense = weights(shapes, nested=False)
    rows = int8_ops.unpack_rows(states, int8_ops.weight_scales(states))
    assert not dense[1].any() and not rows.codes_NK[1].any() and rows.scale_N[1] > 0
    assert rows.codes_NK[0].any()


def check_rotated(states, dense, slack):
    """Check codes of the rotated weight: they may be `slack` of a step away, and few are not what their definition gives."""
    scales = int8_ops.weight_scales(states, is_rotated=True)
    truth = dense.double() @ hadamard(dense.shape[1] // 64)
    rows = int8_ops.unpack_rows(states, scales)
    assert scales.is_rotated and fits(rows, truth, slack) and not fits(rows, dense, slack)
    assert torch.equal(scales.column_D, int8_ops.weight_scales(states).column_D)
    plain = torch.empty_like(rows.codes_NK)
    int8_reference.unpack_rows_(states, scales, plain)
    away = (rows.codes_NK.int() - plain.int()).abs()
    assert away.max() <= 1 and away.float().mean() < 5e-3  # few values lie on the edge between two codes
    poison(states)
    assert not torch.equal(int8_ops.unpack_rows(states, scales).codes_NK, rows.codes_NK)


@pytest.mark.parametrize(("shapes", "nested"), ROTATED)
def test_rotated_codes_are_the_rotated_weight_rounded(shapes, nested):
    check_rotated(*weights(shapes, nested), slack=0.1)


def test_weights_whose_groups_have_several_block_scales_are_rotated_too():
    states, _ = weights([(40, 128)], nested=False)
    states = [replace(states[0], block_size=32, absmax_M=draw(160, seed=3).abs() + 0.1)]
    check_rotated(states, ops.dequantize_nf4(states[0], torch.bfloat16), slack=0.01)  # it rotates values in bf16


def test_rotation_takes_bytes_that_are_not_aligned_to_words():
    states, dense = weights([(16, 128)], nested=True)
    packed = torch.cat((states[0].packed.new_zeros(1), states[0].packed))[1:]
    assert packed.data_ptr() % 4
    check_rotated([replace(states[0], packed=packed)], dense, slack=0.1)


@pytest.mark.parametrize("is_rotated", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (5, 192), (3, 576), (2, 4416)])
def test_rows_are_quantised_by_their_largest_value(shape, dtype, is_rotated):
    x = draw(*shape, dtype=dtype)
    x[:, 3] *= 20  # an outlier
    truth = x.double() @ hadamard(shape[1] // 64) if is_rotated else x.double()
    rows = int8_ops.quantize_rows(x, is_rotated)
    assert fits(rows, truth, slack=1e-4) and not fits(rows, truth.roll(1, 1), slack=1e-4)
    if not is_rotated:
        plain = int8_reference.quantize_rows(x, False)
        assert torch.equal(rows.codes_NK, plain.codes_NK) and torch.equal(rows.scale_N, plain.scale_N)


@pytest.mark.parametrize("width", [1, 7, 66, 131, 4099])
def test_rows_of_any_width_are_quantised(width):
    x = draw(4, width)
    assert fits(int8_ops.quantize_rows(x), x) and not fits(int8_ops.quantize_rows(x), 2 * x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width", [1, 96, 1000])
def test_the_gradient_of_a_gated_unit_comes_with_its_codes(width, activation, dtype):
    num_tokens = 3
    wide_dh, wide = draw(num_tokens, width + 1, dtype=dtype, seed=1), draw(num_tokens, 2 * width + 1, dtype=dtype)
    wide[1] = 0.0  # a token of zeros
    dh, gate_up, again = wide_dh[:, 1:], wide[:, 1:], [wide_dh[:, 1:].clone(), wide[:, 1:].clone()]
    rows = int8_ops.glu_backward_codes_(dh, gate_up, activation)
    ops.glu_backward_(again[0], *again[1].chunk(2, dim=1), activation)
    for ours, plain in ((dh, again[0]), (gate_up, again[1])):  # products that are fused into sums may round otherwise
        assert torch.allclose(ours.float(), plain.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    expected = int8_ops.quantize_rows(gate_up)
    assert torch.equal(rows.codes_NK, expected.codes_NK) and torch.equal(rows.scale_N, expected.scale_N)
    assert fits(rows, gate_up) and rows.codes_NK[0].any() and not rows.codes_NK[1].any()
    twin = int8_ops.glu_backward_codes_(draw(num_tokens, width, dtype=dtype, seed=2), wide[:, 1:].clone(), activation)
    assert not torch.equal(twin.scale_N, rows.scale_N)


def test_the_codes_of_a_wide_token_and_of_one_that_is_not_finite():
    for width in (16_384, 20_000):
        dh, gate_up = draw(1, width, seed=1), draw(1, 2 * width)
        rows = int8_ops.glu_backward_codes_(dh, gate_up, "silu")
        assert fits(rows, gate_up) and rows.codes_NK.abs().max() == 127
    for bad in (float("nan"), float("inf")):
        dh, gate_up = draw(2, 70, seed=1), draw(2, 140)
        dh[1, 3] = bad
        rows = int8_ops.glu_backward_codes_(dh, gate_up, "silu")
        assert rows.scale_N[1].isinf() and rows.scale_N[0].isfinite()


def test_a_rotation_makes_an_outlier_cost_less():
    x = draw(16, 256, scale=0.1)
    x[:, 5] = 10.0
    errors = []
    for is_rotated in (False, True):
        rows = int8_ops.quantize_rows(x, is_rotated)
        back = rows.codes_NK.double() * rows.scale_N.double()[:, None]
        errors.append((back @ hadamard(4) - x if is_rotated else back - x).norm())
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("is_rotated", [False, True])
def test_strided_rows_of_zeros_and_empty_inputs_are_quantised(is_rotated):
    wide = draw(5, 3 * 64, dtype=torch.bfloat16)
    wide[2] = 0.0
    x = wide[:, 64:128]
    ours, dense = int8_ops.quantize_rows(x, is_rotated), int8_ops.quantize_rows(x.contiguous(), is_rotated)
    assert torch.equal(ours.codes_NK, dense.codes_NK) and torch.equal(ours.scale_N, dense.scale_N)
    assert not ours.codes_NK[2].any() and ours.scale_N[2] > 0 and ours.codes_NK[1].any()
    assert int8_ops.quantize_rows(x[:0], is_rotated).codes_NK.shape == (0, 64)


@pytest.mark.parametrize("is_rotated", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_shows_in_its_row_of_the_product_and_in_no_other(bad, is_rotated):
    x, w = draw(4, 128, dtype=torch.bfloat16), int8_ops.quantize_rows(draw(6, 128, seed=1), is_rotated)
    good = int8_ops.matmul(int8_ops.quantize_rows(x, is_rotated), w, torch.bfloat16)
    x[2, 70] = bad
    y = int8_ops.matmul(int8_ops.quantize_rows(x, is_rotated), w, torch.bfloat16)
    others = [0, 1, 3]
    assert not y[2].isfinite().any() and torch.equal(y[others], good[others]) and good.isfinite().all()


def random_rows(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (rows, width), generator=generator, dtype=torch.int8)
    return Int8Rows(codes.to(DEVICE), draw(rows, seed=seed + 1).abs() + 0.01)


@pytest.mark.parametrize("sizes", MATMULS)
def test_a_product_of_codes_is_exact(sizes):
    t, n, k = sizes
    a, b = random_rows(t, k, 0), random_rows(n, k, 9)
    sums = (a.codes_NK.double() @ b.codes_NK.double().t()).float()
    c = int8_ops.matmul(a, b, torch.float32)
    assert torch.equal(c, sums * a.scale_N[:, None] * b.scale_N)
    assert torch.equal(int8_ops.matmul(a, b, torch.bfloat16), c.bfloat16())
    assert torch.equal(int8_ops.matmul(a, b, torch.float16), c.half())
    codes = a.codes_NK.clone()
    codes[-1, -1] ^= 1
    assert not torch.equal(int8_ops.matmul(replace(a, codes_NK=codes), b, torch.float32), c)


def test_the_largest_codes_do_not_overflow():
    a = Int8Rows(torch.full((2, 4096), 127, dtype=torch.int8, device=DEVICE), torch.ones(2, device=DEVICE))
    b = replace(a, codes_NK=-a.codes_NK)
    assert (int8_ops.matmul(a, b, torch.float32) == -4096 * 127**2).all()


@pytest.mark.parametrize(  # every two of the three together
    ("rank", "dtype", "with_bias"),
    [(rank, dtype, (i + j) % 2 == 0) for i, rank in enumerate((1, 16, 24, 130)) for j, dtype in enumerate(DTYPES)],
)
def test_the_low_rank_term_and_the_bias_are_added_in_fp32(dtype, rank, with_bias):
    t, n, k = 70, 130, 96
    a, b = random_rows(t, k, 0), random_rows(n, k, 9)
    low, low_b = draw(t, rank, dtype=dtype, seed=3, scale=40.0), draw(n, rank, dtype=dtype, seed=4, scale=40.0)
    bias = draw(n, dtype=dtype, seed=5, scale=2e4) if with_bias else None

    def plain(wide):
        sums = (a.codes_NK.double() @ b.codes_NK.double().t()).to(wide) * a.scale_N[:, None] * b.scale_N
        total = sums.to(wide) + low.to(wide) @ low_b.to(wide).t()
        return total if bias is None else total + bias.to(wide)

    truth, rounded = plain(torch.float64), plain(torch.float32).to(dtype)
    c = int8_ops.matmul(a, b, dtype, LowRank(low, low_b), bias)
    assert c.dtype == dtype and as_good_as_torch(c, rounded, truth)
    assert not as_good_as_torch(int8_ops.matmul(a, b, dtype, LowRank(low, -low_b), bias), rounded, truth)
    assert not as_good_as_torch(int8_ops.matmul(a, b, dtype, None, bias), rounded, truth)
    if with_bias:
        assert not as_good_as_torch(int8_ops.matmul(a, b, dtype, LowRank(low, low_b)), rounded, truth)


@pytest.mark.parametrize(("firsts", "rank"), [((256,), 16), ((512, 768), 3)])
def test_layers_side_by_side_have_terms_of_their_own(firsts, rank):
    t, n, k = 37, 1000, 64
    a, b, ends = random_rows(t, k, 0), random_rows(n, k, 9), (0, *firsts, n)
    low = draw(t, rank * (len(ends) - 1), dtype=torch.bfloat16, seed=3, scale=40.0)
    low_b = draw(n, rank, dtype=torch.bfloat16, seed=4, scale=40.0)
    c, plain, truth = int8_ops.matmul(a, b, torch.float32), [], []
    together = int8_ops.matmul(a, b, torch.bfloat16, LowRank(low, low_b), firsts=firsts)
    for i, (first, end) in enumerate(pairwise(ends)):
        own = LowRank(low[:, i * rank : (i + 1) * rank], low_b[first:end])
        rows = Int8Rows(b.codes_NK[first:end], b.scale_N[first:end].contiguous())
        plain.append(int8_ops.matmul(a, rows, torch.bfloat16, own))
        truth.append(c[:, first:end].double() + own.low_TR.double() @ own.b_FR.double().t())
    plain, truth = torch.cat(plain, 1), torch.cat(truth, 1)
    assert as_good_as_torch(together, plain, truth)
    turned = LowRank(low.roll(rank, 1), low_b)
    assert not as_good_as_torch(int8_ops.matmul(a, b, torch.bfloat16, turned, firsts=firsts), plain, truth)


@pytest.mark.parametrize("firsts", [(100,), (512, 256), (0,), (1024,), (256, 512, 768)])
def test_layers_side_by_side_begin_at_columns_that_no_tile_crosses(firsts):
    a, b = random_rows(3, 64, 0), random_rows(1000, 64, 9)
    low = LowRank(draw(3, 4 * (len(firsts) + 1), seed=3), draw(1000, 4, seed=4))
    with pytest.raises(EngineError, match=r"firsts .*: expected at most 2, ascending multiples of 256"):
        int8_ops.matmul(a, b, torch.float32, low, firsts=firsts)


def test_strides_of_codes_and_terms_change_nothing():
    a, b = random_rows(33, 256, 0), random_rows(66, 256, 9)
    a, b = (replace(rows, codes_NK=rows.codes_NK[:, 64:192]) for rows in (a, b))
    low, low_b = draw(33, 64, seed=3, dtype=torch.bfloat16)[:, ::2], draw(32, 66, seed=4, dtype=torch.bfloat16).t()
    dense = [replace(rows, codes_NK=rows.codes_NK.contiguous()) for rows in (a, b)]
    ours = int8_ops.matmul(a, b, torch.bfloat16, LowRank(low, low_b))
    assert torch.equal(ours, int8_ops.matmul(*dense, torch.bfloat16, LowRank(low.contiguous(), low_b.contiguous())))
    assert not torch.equal(ours, int8_ops.matmul(*dense, torch.bfloat16, LowRank(low.contiguous(), low_b.contiguous().flip(1))))


def test_a_row_s_product_depends_on_no_other_row():
    a, b = random_rows(130, 192, 0), random_rows(70, 192, 9)
    term = LowRank(draw(130, 8, dtype=torch.bfloat16), draw(70, 8, dtype=torch.bfloat16, seed=2))
    whole = int8_ops.matmul(a, b, torch.bfloat16, term)
    part = slice(60, 75)
    some = Int8Rows(a.codes_NK[part], a.scale_N[part])
    assert torch.equal(whole, int8_ops.matmul(a, b, torch.bfloat16, term))
    ours = int8_ops.matmul(some, b, torch.bfloat16, LowRank(term.low_TR[part], term.b_FR))
    assert torch.equal(ours.float(), whole[part].float()) and not torch.equal(whole[part], whole[:15])


@pytest.mark.parametrize("is_rotated", [False, True])
def test_both_directions_of_a_linear_layer_agree_with_its_dequantised_weight(is_rotated):
    states, dense = weights([(96, 128), (64, 128)], nested=True)
    scales = int8_ops.weight_scales(states, is_rotated)
    x, dy = draw(50, 128, dtype=torch.bfloat16), draw(50, 160, dtype=torch.bfloat16, seed=7)
    y = int8_ops.matmul(int8_ops.quantize_rows(x, is_rotated), int8_ops.unpack_rows(states, scales), torch.float32)
    dx = int8_ops.matmul(int8_ops.quantize_rows(dy), int8_ops.unpack_columns(states, scales), torch.float32)

    def away(ours, truth):
        return ((ours - truth).norm() / truth.norm()).item()

    truth, other = x.float() @ dense.t(), int8_ops.quantize_rows(x, not is_rotated)
    assert away(y, truth) < 0.02 and away(dx, dy.float() @ dense) < 0.02
    assert away(int8_ops.matmul(other, int8_ops.unpack_rows(states, scales), torch.float32), truth) > 0.5
    assert away(dx, dy.float().roll(1, 1) @ dense) > 0.5


def test_no_tokens_are_no_error():
    a, b = random_rows(0, 64, 0), random_rows(8, 64, 1)
    assert int8_ops.matmul(a, b, torch.bfloat16).shape == (0, 8)


def test_wrong_layouts_are_refused_in_one_line():
    states, _ = weights([(6, 64), (4, 64)], nested=False)
    others, _ = weights([(6, 66)], nested=False)
    scales, a = int8_ops.weight_scales(states), random_rows(4, 64, 0)
    low = LowRank(draw(4, 2), draw(4, 2))
    refused = [
        lambda: int8_ops.weight_scales([]),
        lambda: int8_ops.weight_scales([*states, *others]),
        lambda: int8_ops.weight_scales(others, is_rotated=True),
        lambda: int8_ops.unpack_rows(states[:1], scales),
        lambda: int8_ops.unpack_columns(others, scales),
        lambda: int8_ops.quantize_rows(draw(4, 64).t()),
        lambda: int8_ops.quantize_rows(draw(4, 66), is_rotated=True),
        lambda: int8_ops.quantize_rows(torch.zeros(4, 64, dtype=torch.int8, device=DEVICE)),
        lambda: int8_ops.glu_backward_codes_(draw(4, 8), draw(4, 15), "silu"),
        lambda: int8_ops.glu_backward_codes_(draw(4, 8), draw(16, 4).t(), "silu"),
        lambda: int8_ops.glu_backward_codes_(draw(4, 8), draw(4, 16, dtype=torch.bfloat16), "silu"),
        lambda: int8_ops.glu_backward_codes_(draw(4, 8), draw(4, 16), "relu"),
        lambda: int8_ops.matmul(a, random_rows(4, 63, 0), torch.bfloat16),
        lambda: int8_ops.matmul(a, replace(a, scale_N=a.scale_N[:3]), torch.bfloat16),
        lambda: int8_ops.matmul(a, replace(a, codes_NK=a.codes_NK.float()), torch.bfloat16),
        lambda: int8_ops.matmul(a, a, torch.bfloat16, low),
        lambda: int8_ops.matmul(a, a, torch.float32, LowRank(draw(3, 2), draw(4, 2))),
        lambda: int8_ops.matmul(a, a, torch.float32, LowRank(draw(4, 300), draw(4, 300))),
        lambda: int8_ops.matmul(a, a, torch.float32, None, draw(3)),
    ]
    for call in refused:
        with pytest.raises(EngineError) as caught:
            call()
        assert "\n" not in str(caught.value)
