"""Compare kernels with fp64: their error may barely exceed that of the same formula in torch.

torch computes in the working dtype. `kernel_checks` says where the kernels run. Each comparison has
a twin that must fail. Outputs start as NaN, so an element that no program wrote shows.
"""

import sys
from types import SimpleNamespace

import pytest
import torch

from engine.errors import EngineError
from engine.kernels import ops, reference
from tests.support.kernel_checks import (
    DEVICE,
    DTYPES,
    as_good_as_torch,
    draw,
    error,
    plain_glu,
    same_as_dense,
)
from tests.support.kernel_checks import implementation as implementation  # runs on kernel and reference

SHAPES_TD = [(1, 1), (3, 5), (5, 576), (2, 1536), (2, 4096)]
EPS = 1e-5


# --- RMSNorm


def plain_norm(x, weight, eps, offset, dtype):
    """Compute RMSNorm as the models do, in `dtype` except for the mean."""
    x = x.to(dtype)
    wide = x.double() if dtype == torch.float64 else x.float()
    n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight.to(dtype) * n.to(dtype) if offset == 0.0 else (n * (offset + weight.to(n.dtype))).to(dtype)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES_TD)
def test_rms_norm_is_as_good_as_torch_and_a_wrong_eps_or_offset_is_seen(shape, dtype, offset):
    x, weight = draw(*shape, dtype=dtype), draw(shape[1], dtype=dtype, seed=1)
    truth = plain_norm(x, weight, EPS, offset, torch.float64)
    plain = plain_norm(x, weight, EPS, offset, dtype)
    y, rstd = ops.rms_norm(x, weight, EPS, offset)
    assert y.dtype == dtype and rstd.dtype == torch.float32 and rstd.shape == shape[:1]
    assert as_good_as_torch(y, plain, truth)
    assert error(rstd, (x.double().square().mean(1) + EPS).rsqrt()) < 1e-6
    assert not as_good_as_torch(ops.rms_norm(x, weight, 0.1, offset)[0], plain, truth)
    assert not as_good_as_torch(ops.rms_norm(x, weight, EPS, offset + 0.5)[0], plain, truth)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_rounds_where_the_models_round(offset):
    x, weight = draw(6, 512, dtype=torch.bfloat16), draw(512, dtype=torch.bfloat16, seed=1)
    ours = ops.rms_norm(x, weight, EPS, offset)[0]
    same, other = (plain_norm(x, weight, EPS, o, torch.bfloat16) for o in (offset, 1.0 - offset))
    assert (ours != same).float().mean() < 5e-3  # few elements are rounding ties
    rounded_elsewhere = (plain_norm(x.double(), weight, EPS, 0.0, torch.float64)).bfloat16()
    if offset == 0.0:
        assert (ours != rounded_elsewhere).float().mean() > 0.1
    assert not torch.equal(ours, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES_TD)
def test_add_rms_norm_adds_rounds_and_normalises_the_rounded_sum(shape, dtype):
    x, delta, weight = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=2), draw(shape[1], dtype=dtype, seed=1)
    total, y, rstd = ops.add_rms_norm(x, delta, weight, EPS)
    assert torch.equal(total, x + delta) and not torch.equal(total, x)
    y_of_sum, rstd_of_sum = ops.rms_norm(x + delta, weight, EPS)
    assert torch.equal(y, y_of_sum) and torch.equal(rstd, rstd_of_sum)
    assert not torch.equal(rstd, ops.rms_norm(x, weight, EPS)[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_scales_what_it_adds(dtype):
    x, delta, weight = draw(4, 48, dtype=dtype), draw(4, 48, dtype=dtype, seed=2), draw(48, dtype=dtype, seed=1)
    total, y, _ = ops.add_rms_norm(x, delta, weight, EPS, scale=0.22)
    assert as_good_as_torch(total, x + 0.22 * delta, x.double() + 0.22 * delta.double())
    assert torch.equal(y, ops.rms_norm(total, weight, EPS)[0])
    assert not torch.equal(total, ops.add_rms_norm(x, delta, weight, EPS)[0])


def test_a_norm_that_rounds_once_rounds_only_its_result():
    x, weight = draw(6, 512, dtype=torch.bfloat16), draw(512, dtype=torch.bfloat16, seed=1)
    truth = plain_norm(x, weight, EPS, 0.0, torch.float64).bfloat16()
    once = ops.rms_norm(x, weight, EPS, round_once=True)[0]
    assert (once != truth).float().mean() < 5e-3 and (ops.rms_norm(x, weight, EPS)[0] != truth).float().mean() > 0.1
    _, added, _ = ops.add_rms_norm(x, torch.zeros_like(x), weight, EPS, round_once=True)
    assert torch.equal(added, once)


def norm_gradient(x, weight, dy, offset, residual, dtype):
    x = x.detach().to(dtype).requires_grad_()
    plain_norm(x, weight, EPS, offset, dtype).backward(dy.to(dtype))
    return x.grad if residual is None else x.grad + residual.to(dtype)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (7, 576), (2, 4096)])
def test_rms_norm_backward_is_as_good_as_autograd_and_needs_every_input(shape, dtype, offset, with_residual):
    x, dy, weight = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=2), draw(shape[1], dtype=dtype, seed=1)
    residual = draw(*shape, dtype=dtype, seed=3) if with_residual else None
    rstd = ops.rms_norm(x, weight, EPS, offset)[1]
    truth = norm_gradient(x, weight, dy, offset, residual, torch.float64)
    plain = norm_gradient(x, weight, dy, offset, residual, dtype)
    assert as_good_as_torch(ops.rms_norm_backward(dy, x, weight, rstd, offset, residual), plain, truth)
    wrong = [
        (dy, x, weight, rstd * 1.05, offset, residual),
        (dy, x, weight.flip(0), rstd, offset, residual),
        (dy, x.flip(1), weight, rstd, offset, residual),
        (dy, x, weight, rstd, offset, dy if residual is None else None),
    ]
    for arguments in wrong:
        assert not as_good_as_torch(ops.rms_norm_backward(*arguments), plain, truth)


def test_norm_reads_strided_rows(implementation):
    wide, weight = draw(5, 3 * 48), draw(48, seed=1)
    x, dy, residual = wide.split(48, dim=1)
    y, rstd = ops.rms_norm(x, weight, EPS)
    dense = ops.rms_norm(x.contiguous(), weight, EPS)[0]
    assert same_as_dense(implementation, y, dense) and not same_as_dense(implementation, y, dense.flip(1))
    total, _, _ = ops.add_rms_norm(x, dy, weight, EPS)
    assert torch.equal(total, x + dy)
    dx = ops.rms_norm_backward(dy, x, weight, rstd, 0.0, residual)
    packed = (t.contiguous() for t in (dy, x, weight, rstd))
    assert same_as_dense(implementation, dx, ops.rms_norm_backward(*packed, 0.0, residual.contiguous()))


# --- rotary embedding


def angles(num_tokens, head_dim, dtype=torch.float32, shift=0):
    frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = (torch.arange(num_tokens) + 3 + shift)[:, None] * frequency
    return [f(angle).repeat(1, 2).to(DEVICE, dtype) for f in (torch.cos, torch.sin)]


def plain_rope(x, cos, sin, dtype):
    x = x.to(dtype)
    turned = torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)
    return x * cos[:, None].to(dtype) + turned * sin[:, None].to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 2), (5, 9, 3, 64), (3, 32, 8, 128), (4, 5, 2, 10)])
def test_rope_is_as_good_as_torch_and_its_inverse_is_the_gradient(sizes, dtype):
    num_tokens, num_q, num_k, head_dim = sizes
    cos, sin = angles(num_tokens, head_dim, dtype)
    inputs = [draw(num_tokens, n, head_dim, dtype=dtype, seed=n) for n in (num_q, num_k)]

    def run(cos, sin, inverse=False):
        outputs = [x.clone() for x in inputs]
        ops.rope_(*outputs, cos, sin, inverse)
        return outputs

    def all_good(outputs, sign=1.0):
        truths = [plain_rope(x, cos, sign * sin, torch.float64) for x in inputs]
        plains = [plain_rope(x, cos, sign * sin, dtype) for x in inputs]
        return [as_good_as_torch(*triple) for triple in zip(outputs, plains, truths)]

    assert all(all_good(run(cos, sin)))
    assert not any(all_good(run(*angles(num_tokens, head_dim, dtype, shift=1))))
    assert all(all_good(run(cos, sin, inverse=True), sign=-1.0))
    assert not any(all_good(run(cos, sin, inverse=True)))
    # <rotate(x), dy> = <x, rotate back(dy)>, so autograd gives the expected result
    leaf = inputs[0].double().requires_grad_()
    dy = draw(*leaf.shape, seed=7, dtype=dtype)
    plain_rope(leaf, cos, sin, torch.float64).backward(dy.double())
    dx, other = dy.clone(), inputs[1].clone()
    ops.rope_(dx, other, cos, sin, inverse=True)
    assert as_good_as_torch(dx, plain_rope(dy, cos, -sin, dtype), leaf.grad)


def test_rope_turns_slices_of_a_fused_buffer_and_touches_nothing_else(implementation):
    num_tokens, num_q, num_k, head_dim = 5, 6, 2, 16
    fused = draw(num_tokens, (num_q + 2 * num_k) * head_dim)
    before = fused.clone()
    cos, sin = angles(num_tokens, head_dim)
    q, k, v = (part.unflatten(1, (-1, head_dim)) for part in fused.split([n * head_dim for n in (num_q, num_k, num_k)], dim=1))
    q_dense, k_dense = q.clone(), k.clone()
    ops.rope_(q, k, cos, sin)
    ops.rope_(q_dense, k_dense, cos, sin)
    assert same_as_dense(implementation, q, q_dense) and same_as_dense(implementation, k, k_dense)
    assert torch.equal(v.flatten(1), before[:, -num_k * head_dim :])
    assert not torch.equal(fused, before)
    ops.rope_(q, k, cos, sin, inverse=True)
    assert torch.allclose(fused, before, atol=1e-5)


def plain_part_of_rope(x, cos, sin, pairs, dtype):
    """Rotate the first features of x as cos and sin are wide, neighbours with each other if `pairs`."""
    width = cos.shape[1]
    part, rest = x[..., :width], x[..., width:]
    if not pairs:
        return torch.cat((plain_rope(part, cos, sin, dtype), rest.to(dtype)), dim=-1)
    apart = torch.cat((part[..., 0::2], part[..., 1::2]), dim=-1)
    turned = plain_rope(apart, cos, sin, dtype)
    return torch.cat((torch.stack(turned.chunk(2, dim=-1), dim=-1).flatten(-2), rest.to(dtype)), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "pairs"), [(12, False), (16, True), (12, True), (2, True)])
def test_rope_turns_the_first_features_alone_or_in_pairs(width, pairs, dtype):
    cos, sin = angles(5, width, dtype)
    inputs = [draw(5, heads, 16, dtype=dtype, seed=heads) for heads in (3, 2)]

    def all_good(outputs, pairs, sign=1.0):
        plains, truths = (
            [plain_part_of_rope(x, cos, sign * sin, pairs, kind) for x in inputs] for kind in (dtype, torch.float64)
        )
        return [as_good_as_torch(*triple) for triple in zip(outputs, plains, truths)]

    for inverse in (False, True):
        outputs = [x.clone() for x in inputs]
        ops.rope_(*outputs, cos, sin, inverse, pairs)
        assert all(all_good(outputs, pairs, -1.0 if inverse else 1.0)) and not any(
            all_good(outputs, pairs, 1.0 if inverse else -1.0)
        )
        assert width == 2 or not any(all_good(outputs, not pairs, -1.0 if inverse else 1.0))
        assert all(torch.equal(ours[..., width:], x[..., width:]) for ours, x in zip(outputs, inputs))


# --- gated linear unit


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 576), (2, 5000)])
def test_glu_is_as_good_as_torch_forward_and_backward(shape, dtype, activation):
    gate, up, dh = (draw(*shape, dtype=dtype, seed=seed, scale=3.0) for seed in (0, 1, 2))
    (other,) = (a for a in ops.ACTIVATIONS if a != activation)

    def leaves_and_h(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (gate, up)]
        h = plain_glu(*leaves, activation, dtype)
        return [h.detach(), *torch.autograd.grad(h, leaves, dh.to(dtype))]

    def in_place(activation, up):
        buffers = [dh.clone(), gate.clone(), up.clone()]
        ops.glu_backward_(*buffers, activation)
        return buffers

    truths, plains = leaves_and_h(torch.float64), leaves_and_h(dtype)
    h = ops.glu(gate, up, activation)
    assert as_good_as_torch(h, plains[0], truths[0])
    assert not as_good_as_torch(ops.glu(gate, up, other), plains[0], truths[0])
    for ours, plain, truth in zip(in_place(activation, up), plains, truths):
        assert as_good_as_torch(ours, plain, truth)
    for ours, plain, truth in zip(in_place(other, up), plains, truths):
        assert not as_good_as_torch(ours, plain, truth)
    assert torch.equal(in_place(activation, up)[0], h)  # backward recomputes the same h


def test_glu_reads_and_writes_slices_of_a_fused_buffer(implementation):
    fused, dh = draw(4, 2 * 48), draw(4, 48, seed=1)
    gate, up = fused.chunk(2, dim=1)
    dense = [dh.clone(), gate.clone(), up.clone()]
    other = ops.glu(dense[1], dense[2], "gelu_tanh")
    assert same_as_dense(implementation, ops.glu(gate, up, "silu"), ops.glu(dense[1], dense[2], "silu"))
    assert not same_as_dense(implementation, ops.glu(gate, up, "silu"), other)
    ops.glu_backward_(dh, gate, up, "silu")
    ops.glu_backward_(*dense, "silu")
    assert all(same_as_dense(implementation, a, b) for a, b in zip((dh, gate, up), dense))
    assert not same_as_dense(implementation, dh, other)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_glu_saturates_without_nan(activation):
    gate = torch.tensor([[-1e4, -200.0, -0.0, 200.0, 1e4]], device=DEVICE)
    dh, up, dgate = torch.ones_like(gate), torch.ones_like(gate), gate.clone()
    ops.glu_backward_(dh, dgate, up, activation)
    assert torch.equal(dh, gate.clamp(min=0.0)) and torch.equal(dgate, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]], device=DEVICE))


# --- NF4


def quantized(shape, dtype, nested):
    """Return a stand-in for Params4bit (data and quant_state), with absmax that varies by block."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = draw(*shape, dtype=dtype, seed=5)
    weight[: max(1, shape[0] // 3)] *= 17.0
    data, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    with torch.compiler.set_stance("force_eager"):  # for odd shapes it compiles its own formula, once a shape
        return SimpleNamespace(data=data, quant_state=state), functional.dequantize_4bit(data, state)


# Cases in order, of tiles of 1,024 elements: whole tiles, a partial tile of words, bytes (17 x 66 / 2 is
# odd), an odd number of elements, less than a block, one element.
NF4_SHAPES = [(16, 192), (20, 64), (17, 66), (7, 131), (3, 10), (1, 1)]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", NF4_SHAPES)
def test_dequantisation_is_bit_equal_to_bitsandbytes(shape, dtype, nested):
    weight, expected = quantized(shape, dtype, nested)
    state = ops.nf4_state(weight)
    assert torch.equal(ops.dequantize_nf4(state, dtype), expected)
    out = torch.empty(shape, dtype=dtype, device=DEVICE)
    assert ops.dequantize_nf4(state, dtype, out) is out and torch.equal(out, expected)
    state.packed[-1] ^= 0x70  # the last byte's high nibble, an element in any shape
    assert not torch.equal(ops.dequantize_nf4(state, dtype), expected)
    state.packed[-1] ^= 0x70
    (state.nested_offset if nested else state.absmax_M[-1:]).mul_(1.5)
    assert not torch.equal(ops.dequantize_nf4(state, dtype), expected)


def test_blocks_beyond_the_first_256_have_the_next_scale_of_scales():
    weight, expected = quantized((258, 64), torch.bfloat16, nested=True)
    state = ops.nf4_state(weight)
    assert len(state.nested_absmax_S) == 2 and torch.equal(ops.dequantize_nf4(state, torch.bfloat16), expected)
    state.nested_absmax_S[1] *= 1.5
    other = ops.dequantize_nf4(state, torch.bfloat16) != expected
    assert not other[:256].any() and other[256].any() and other[257].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantisation_into_another_dtype_is_the_fp32_value_rounded_once(dtype):
    weight, _ = quantized((33, 128), torch.float16, nested=True)
    state = ops.nf4_state(weight)
    wide = ops.dequantize_nf4(state, torch.float32)
    assert torch.equal(ops.dequantize_nf4(state, dtype), wide.to(dtype))
    assert not torch.equal(wide, wide.half().float())


def test_dequantisation_takes_bytes_that_are_not_aligned_to_words():
    weight, expected = quantized((16, 64), torch.float32, nested=False)
    shifted = torch.cat((weight.data.new_zeros(1, 1), weight.data))[1:]
    state = ops.nf4_state(SimpleNamespace(data=shifted, quant_state=weight.quant_state))
    assert state.packed.data_ptr() % 4 != 0
    assert torch.equal(ops.dequantize_nf4(state, torch.float32), expected)


# --- what is refused, and where things run


def test_wrong_layouts_and_names_are_refused_in_one_line():
    x, weight = draw(4, 6), draw(6)
    weight4, _ = quantized((4, 64), torch.float32, nested=False)
    state = ops.nf4_state(weight4)
    refused = [
        lambda: ops.rms_norm(x.t(), weight, EPS),
        lambda: ops.rms_norm(x, weight[:5], EPS),
        lambda: ops.add_rms_norm(x, x.double(), weight, EPS),
        lambda: ops.rms_norm_backward(x, x, weight, draw(3)),
        lambda: ops.rope_(draw(4, 2, 6), draw(4, 2, 8), draw(4, 6), draw(4, 6)),
        lambda: ops.rope_(draw(4, 2, 5), draw(4, 2, 5), draw(4, 5), draw(4, 5)),
        lambda: ops.glu(x, x, "relu"),
        lambda: ops.glu(x, x[:3], "silu"),
        lambda: ops.dequantize_nf4(state, torch.float32, out=draw(64, 4).t()),
    ]
    for call in refused:
        with pytest.raises(EngineError) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_cpu_tensors_go_to_the_reference_unless_forced(implementation, monkeypatch):
    if implementation == "reference":
        pytest.skip("the dispatch itself is replaced here")
    monkeypatch.setattr(ops, "FORCE_TRITON", False)
    cpu = torch.zeros(1)
    assert ops._family("norm", cpu) is reference
    monkeypatch.setattr(ops, "FORCE_TRITON", True)
    assert ops._family("norm", cpu).__name__ == "engine.kernels.norm"


def test_a_missing_triton_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(EngineError, match="pip install triton"):
        ops.load_kernels.__wrapped__("norm")
