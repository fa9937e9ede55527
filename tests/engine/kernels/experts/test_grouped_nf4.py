"""Products of experts in Triton against plain torch in fp64, with failing twins. Without a card they are interpreted."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.experts import expert_ops, expert_reference, grouped_dense, grouped_nf4, routed_rows, turned
from engine.kernels.experts.grouped_nf4 import ExpertTile
from engine.kernels.experts.packed_experts import dequantize_experts, pack, unpack_state
from engine.kernels.nf4_state import nf4_state
from engine.quant.bnb import quantize_nf4
from tests.support.kernel_checks import DEVICE, DTYPES, draw
from tests.support.kernel_checks import implementation as implementation  # runs on kernel and reference

TILES = {False: ExpertTile(16, 64, 64, 4, 2), True: ExpertTile(16, 64, 128, 4, 2, swapped=True)}
SHAPE, RANK = (3, 48, 192), 5  # part tiles of O and D
COUNTS = (18, 0, 3, 2)  # rows of each expert, and of none: two tiles, none, part of one


def packed(double=True):
    weight = draw(*SHAPE, dtype=torch.float32, seed=9)
    parameter = quantize_nf4(weight.reshape(-1, SHAPE[2]), double)
    return unpack_state(pack(nf4_state(parameter), SHAPE), SHAPE)


def ends():
    return torch.tensor(COUNTS[:3], device=DEVICE).cumsum(0).to(torch.int32)


def close(found, expected, dtype):
    largest = expected.abs().max()
    return bool((found.double() - expected).abs().max() <= largest * (1e-2 if dtype == torch.bfloat16 else 2e-6))


def exact(compute, state, *tensors):
    """Return the definition's result in fp64, on weights rounded to the rows' dtype."""
    weights = dequantize_experts(state, 0, SHAPE[0], tensors[0].dtype).double()
    rows = [t if t is None else t.double() for t in tensors]
    return compute(weights, *rows)


def chosen_module(implementation):
    return grouped_nf4 if implementation == "kernel" else expert_reference


def by_row(weights):
    expert = torch.repeat_interleave(torch.arange(SHAPE[0], device=DEVICE), torch.tensor(COUNTS[:3], device=DEVICE))
    return weights[expert]


def operands(dtype, terms):
    """Return x, dy, bias, low, A and B; without terms the last four are None."""
    (experts, height, width), rows = SHAPE, sum(COUNTS)
    x, dy = draw(rows, width, dtype=dtype), draw(rows, height, dtype=dtype, seed=1)
    if not terms:
        return x, dy, None, None, None, None
    bias, low = draw(experts, height, dtype=dtype, seed=2), draw(rows, RANK, dtype=dtype, seed=3)
    return x, dy, bias, low, draw(experts, RANK, width, dtype=dtype, seed=4), draw(experts, height, RANK, dtype=dtype, seed=4)


def forward(weights, x, bias, low, b):
    y = torch.einsum("sd,sod->so", x[:21], by_row(weights))
    return y if bias is None else y + by_row(bias) + torch.einsum("sr,sor->so", low[:21], by_row(b))


def backward(weights, dy, low, a):
    dx = torch.einsum("so,sod->sd", dy[:21], by_row(weights))
    return dx if low is None else dx + torch.einsum("sr,srd->sd", low[:21], by_row(a))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", [True, False])
def test_forward_and_input_gradient_are_those_of_the_dequantised_weights(implementation, dtype, terms):
    state = packed(double=terms)
    x, dy, bias, low, a, b = operands(dtype, terms)
    module, tile = chosen_module(implementation), {"tile": TILES[terms]} if implementation == "kernel" else {}
    y = module.linear(x, state, ends(), bias, low, b, **tile)
    dx = module.input_gradient(dy, state, ends(), low, a, **tile)

    expected = exact(forward, state, x, bias, low, b), exact(backward, state, dy, low, a)
    assert close(y[:21], expected[0], dtype) and close(dx[:21], expected[1], dtype)
    assert not y[21:].any() and not dx[21:].any()  # rows of no expert
    shifted = ends() - torch.tensor([1, 0, 0], device=DEVICE, dtype=torch.int32)  # twin: a row goes to another expert
    assert not close(module.linear(x, state, shifted, bias, low, b, **tile)[:21], expected[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", [True, False])
def test_torch_s_grouped_product_of_dequantised_experts_gives_the_same(implementation, dtype, terms, monkeypatch):
    if DEVICE == "cuda" and dtype != torch.bfloat16:
        pytest.skip("torch has it in bfloat16 alone")
    state = packed()
    x, dy, bias, low, a, b = operands(dtype, terms)
    expected = exact(forward, state, x, bias, low, b), exact(backward, state, dy, low, a)
    monkeypatch.setattr(grouped_dense, "takes", lambda x, state, room, num_choices=1: room > 0)
    found = [
        expert_ops.linear(x, state, ends(), bias, low, b, room=1),
        expert_ops.input_gradient(dy, state, ends(), low, a, room=1),
    ]
    assert all(close(mine[:21], theirs, dtype) for mine, theirs in zip(found, expected))
    assert not any(mine[21:].any() for mine in found)  # rows of no expert
    if terms:  # twin: without its terms the product is another
        assert not close(expert_ops.linear(x, state, ends(), bias, room=1)[:21], expected[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_products_and_outer_sums_are_the_definition_s(implementation, dtype):
    (experts, _, width), module = SHAPE, chosen_module(implementation)
    x, dlow = draw(sum(COUNTS), width, dtype=dtype), draw(sum(COUNTS), RANK, dtype=dtype, seed=1)
    a, b = draw(experts, RANK, width, dtype=dtype, seed=2), draw(experts, width, RANK, dtype=dtype, seed=3)
    for factor in (a, b.transpose(1, 2)):
        found, expected = module.low_rank(x, factor, ends()), expert_reference.low_rank(x.double(), factor.double(), ends())
        assert close(found, expected, dtype)
    for left, right in ((dlow, x), (x, dlow)):
        found, expected = module.outer(left, right, ends()), expert_reference.outer(left.double(), right.double(), ends())
        assert found.shape == expected.shape and close(found, expected, dtype) and not found[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_s_rows_are_added_up_with_their_weights(implementation, dtype):
    module, rows, weights = chosen_module(implementation), draw(6, 192, dtype=dtype), draw(3, 2, dtype=dtype, seed=1)
    inverse = torch.tensor([4, 0, 1, 5, 3, 2], device=DEVICE)
    picked = rows.double()[inverse].view(3, 2, -1)
    assert close(module.combine(rows, inverse, None, 2), picked.sum(1), dtype)
    expected = (picked * weights.double()[..., None]).sum(1)
    assert close(module.combine(rows, inverse, weights, 2), expected, dtype)
    assert not close(module.combine(rows, inverse.flip(0), weights, 2), expected, dtype)  # twin: rows of other tokens


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_clamped_gate_and_its_gradient_are_those_of_gpt_oss(implementation, dtype):
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    class Gate:
        limit, alpha = 1.5, 1.702

    gate_up, dh = draw(3, 2 * 37, dtype=dtype, scale=2.0), draw(3, 37, dtype=dtype, seed=1)
    leaf = gate_up.double().requires_grad_()
    expected = GptOssExperts._apply_gate(Gate, leaf)
    (wanted,) = torch.autograd.grad(expected, leaf, dh.double())
    found = expert_ops.clamped_gate(gate_up, Gate.limit, Gate.alpha) if implementation == "kernel" else None
    if found is None:  # plain torch is the library's own code
        return
    assert close(found, expected, dtype)
    assert not close(expert_ops.clamped_gate(gate_up, 3.0, Gate.alpha), expected, dtype)  # twin: another limit
    assert expert_ops.clamped_gate_backward_(gate_up, dh, Gate.limit, Gate.alpha) and close(gate_up, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_weighed_and_their_products_find_their_choices(dtype, implementation):
    width, chosen = 1100, torch.tensor([[2, 0], [3, 2], [0, 2]], device=DEVICE)
    dy, y, weights = draw(6, width, dtype=dtype), draw(6, width, dtype=dtype, seed=1), draw(3, 2, dtype=dtype, seed=2)
    order, _, _ = expert_ops.sort_by_expert(chosen, 3)
    expected = (dy.double() * y.double()).sum(-1)
    weighed = dy.double() * weights.flatten()[order].double()[:, None]
    module = routed_rows if implementation == "kernel" else expert_reference
    found = module.weigh_rows_(dy, y, order, weights)
    assert found.dtype == torch.float32 and close(found.flatten()[order], expected, dtype) and close(dy, weighed, dtype)
    assert not close(found.flatten(), expected, dtype)  # twin: the products of other rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_b_is_turned_as_torch_turns_it(dtype):
    """To the bit, but for an interpreter's rounding to bfloat16."""
    b, factor = draw(70 * RANK, 67, dtype=torch.float32), torch.tensor(0.3, device=DEVICE)
    for given in (factor, 0.3):
        found, expected = (module.by_expert(b, given, RANK, dtype) for module in (turned, expert_reference))
        assert close(found, expected.double(), dtype) and (dtype == torch.bfloat16 or torch.equal(found, expected))
        for gradient in (draw(67, 70, RANK, dtype=torch.float32), draw(67, RANK, 70, dtype=torch.float32).transpose(1, 2)):
            assert torch.equal(turned.as_stored(gradient, given), expert_reference.as_stored(gradient, given))
    back = expert_reference.as_stored(expert_reference.by_expert(b, 1.0, RANK, torch.float32), 1.0)
    assert torch.equal(back, b) and not torch.equal(turned.as_stored(gradient, 0.4), expert_reference.as_stored(gradient, 0.3))


def test_rows_are_sorted_by_expert_and_come_back():
    chosen = torch.tensor([[2, 0], [3, 2], [0, 2]], device=DEVICE)
    order, inverse, found = expert_ops.sort_by_expert(chosen, 3)
    assert order.tolist() == [1, 4, 0, 3, 5, 2] and found.tolist() == [2, 2, 5]
    assert torch.equal(order[inverse], torch.arange(6, device=DEVICE))


@pytest.mark.parametrize("num_experts", [3, 255, 256, 300])
def test_the_order_is_that_of_the_numbers_themselves_however_many_experts_there_are(num_experts):
    chosen = torch.randint(0, num_experts, (4096, 2), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    order, _, found = expert_ops.sort_by_expert(chosen, num_experts)
    assert torch.equal(order, chosen.flatten().sort(stable=True).indices)
    assert torch.equal(found, torch.bincount(chosen.flatten(), minlength=num_experts).cumsum(0).to(torch.int32))
    chosen[7] = num_experts + 256  # one of many ways to skip a token
    assert expert_ops.sort_by_expert(chosen, num_experts)[0][-2:].tolist() == [14, 15]


def test_the_grouped_product_is_taken_on_hopper_with_many_rows_and_room(monkeypatch):
    state, room = packed(), 2 * 4 * 48 * 192
    many = torch.zeros(300, 192, dtype=torch.bfloat16, device=DEVICE)
    for card, rows, bytes_, taken in ((90, many, room, True), (89, many, room, False), (90, many[1:], room, False),
                                      (90, many, room - 1, False), (90, many.float(), room, False)):  # fmt: skip
        monkeypatch.setattr(grouped_dense, "capability", lambda x, card=card: card)
        assert grouped_dense.takes(rows, state, bytes_) == taken
