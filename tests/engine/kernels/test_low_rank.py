"""Test the gated linear unit with low-rank terms, as in test_ops: three-way, with failing twins.

Operands and terms are slices of wider buffers, as in a layer that computes gate and up, and their
adapters, together. Each term is surrounded by NaN, so a read beyond its edge shows.

Shape letters: T tokens, F MLP hidden, R rank.
"""

import itertools

import pytest
import torch

from engine.errors import EngineError
from engine.kernels import ops
from engine.kernels.ops import LowRank
from tests.support.kernel_checks import DTYPES, SLACK, as_good_as_torch, draw, error, plain_glu
from tests.support.kernel_checks import implementation as implementation  # runs on kernel and reference

CASES = [  # shape, ranks
    ((1, 1), (1, 1, 1)),
    ((3, 5), (4, 3, 8)),
    ((2, 300), (8, 16, 4)),  # rows of several tiles
    ((70, 80), (128, 16, 70)),  # part tiles both ways, more than one block of R
]
# More row tiles than fit in a group, with a partial last group. A tile has 64 rows, or 32 in fp32.
GROUPED = [(torch.bfloat16, (540, 66)), (torch.float32, (270, 34))]
# rank 0: no term
SUBSETS = [ranks for ranks in itertools.product((0, 16), (0, 3), (0, 70)) if any(ranks)]


def operands(shape, dtype):
    """Return dh, gate and up; the last two are slices of one buffer [T, 2F]."""
    num_tokens, width = shape
    return draw(num_tokens, width, dtype=dtype), *draw(num_tokens, 2 * width, dtype=dtype, seed=1, scale=2.0).chunk(2, dim=1)


def low_rank_terms(shape, ranks, dtype):
    """Return terms for gate, up and dh, each about as large as what it is added to.

    b of the last is transposed, like A in a layer.
    """
    lows = [guarded(draw(shape[0], rank, dtype=dtype, seed=2 + i)) for i, rank in enumerate(ranks)]
    drawn = [draw(shape[1], rank, dtype=dtype, seed=5 + i, scale=max(rank, 1) ** -0.5) for i, rank in enumerate(ranks)]
    bs = [guarded(drawn[0]), guarded(drawn[1]), guarded(drawn[2].t()).t()]
    return [LowRank(low, b) if rank else None for low, b, rank in zip(lows, bs, ranks)]


def guarded(x):
    """Return x as a slice of a buffer of NaN, with rows aligned at least as well."""
    buffer = torch.full((x.shape[0] + 1, x.shape[1] + 16), float("nan"), dtype=x.dtype, device=x.device)
    buffer[:-1, :-16] = x
    return buffer[:-1, :-16]


def plain(tensors, terms, activation, dtype):
    """Return h and the gradients of gate and up, computed in `dtype` throughout."""
    wide = [
        x.to(dtype) if term is None else x.to(dtype) + term.low_TR.to(dtype) @ term.b_FR.to(dtype).t()
        for x, term in zip(tensors, (terms[2], terms[0], terms[1]))
    ]
    leaves = [x.detach().requires_grad_() for x in wide[1:]]
    h = plain_glu(*leaves, activation, dtype)
    return [h.detach(), *torch.autograd.grad(h, leaves, wide[0])]


def in_place(tensors, terms, activation):
    """Return dh, gate and up as the backward pass overwrites them."""
    dh, gate, up = tensors
    dh, (gate, up) = dh.clone(), torch.cat((gate, up), dim=1).chunk(2, dim=1)
    ops.glu_backward_(dh, gate, up, activation, *terms)
    return dh, gate, up


def good(tensors, terms, activation, plains, truths):
    """Return a flag for each of h, dgate and dup: True if its error is as small as torch's."""
    results = in_place(tensors, terms, activation)
    return [as_good_as_torch(*triple) for triple in zip(results, plains, truths)]


def negated(terms, which):
    """Return the terms, with the sign of b wrong in those of `which`."""
    return [LowRank(term.low_TR, -term.b_FR) if term and i in which else term for i, term in enumerate(terms)]


def check(shape, ranks, dtype, activation):
    tensors, terms = operands(shape, dtype), low_rank_terms(shape, ranks, dtype)
    before = [x.clone() for x in tensors]
    truths, plains = (plain(tensors, terms, activation, d) for d in (torch.float64, dtype))
    h = ops.glu(*tensors[1:], activation, *terms[:2])
    assert h.dtype == dtype and as_good_as_torch(h, plains[0], truths[0])
    assert all(torch.equal(x, y) for x, y in zip(tensors, before))
    results = in_place(tensors, terms, activation)
    assert all(as_good_as_torch(*triple) for triple in zip(results, plains, truths))
    wrong = ops.glu(*tensors[1:], activation, *negated(terms[:2], (0, 1)))
    assert as_good_as_torch(wrong, plains[0], truths[0]) == (not any(terms[:2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "ranks"), CASES)
def test_glu_with_terms_is_as_good_as_torch_and_a_wrong_b_is_seen(shape, ranks, dtype):
    check(shape, ranks, dtype, "silu")


@pytest.mark.parametrize(("dtype", "shape"), GROUPED)
def test_each_tile_of_many_is_computed(dtype, shape):
    check(shape, (4, 8, 16), dtype, "gelu_tanh")


@pytest.mark.parametrize(("ranks", "dtype"), [(ranks, DTYPES[i % 2]) for i, ranks in enumerate(SUBSETS)])
def test_any_term_may_be_absent(ranks, dtype):
    check((33, 34), ranks, dtype, "gelu_tanh")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backward_pass_leaves_what_the_forward_pass_made(dtype):
    tensors, terms = operands((33, 34), dtype), low_rank_terms((33, 34), (16, 3, 8), dtype)
    assert torch.equal(in_place(tensors, terms, "silu")[0], ops.glu(*tensors[1:], "silu", *terms[:2]))


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_b_is_seen_where_its_term_has_a_part_and_nowhere_else(dtype, activation):
    shape, ranks = (33, 34), (16, 3, 48)
    tensors, terms = operands(shape, dtype), low_rank_terms(shape, ranks, dtype)
    truths, plains = (plain(tensors, terms, activation, d) for d in (torch.float64, dtype))
    assert good(tensors, terms, activation, plains, truths) == [True, True, True]
    assert good(tensors, negated(terms, [0]), activation, plains, truths) == [False, False, False]
    assert good(tensors, negated(terms, [1]), activation, plains, truths) == [False, False, True]
    assert good(tensors, negated(terms, [2]), activation, plains, truths) == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sums_are_not_rounded(dtype):
    tensors, terms = operands((40, 100), dtype), low_rank_terms((40, 100), (16, 16, 16), dtype)
    truths = plain(tensors, terms, "silu", torch.float64)
    rounded = [
        (x.double() + term.low_TR.double() @ term.b_FR.double().t()).to(dtype)
        for x, term in zip(tensors, (terms[2], terms[0], terms[1]))
    ]
    rounded_too_early = plain(rounded, [None] * 3, "silu", torch.float64)
    for ours, truth, early in zip(in_place(tensors, terms, "silu"), truths, rounded_too_early):
        assert (ours != truth.to(dtype)).double().mean() < 5e-3  # few elements are rounding ties
        assert (ours != early.to(dtype)).double().mean() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_change_nothing_and_neighbours_in_a_buffer_stay(dtype):
    shape = (37, 70)
    dh, gate, up = operands(shape, dtype)
    terms = low_rank_terms(shape, (16, 3, 20), dtype)
    dense_terms = [LowRank(term.low_TR.contiguous(), term.b_FR.contiguous()) for term in terms]
    dense = in_place((dh, gate, up), dense_terms, "gelu_tanh")
    buffer = torch.cat((gate, gate, up, up, dh, dh), dim=1)
    parts = buffer.split(shape[1], dim=1)
    before = [part.clone() for part in parts[::2]]
    ops.glu_backward_(parts[5], parts[1], parts[3], "gelu_tanh", *terms)
    for ours, expected in zip((parts[5], parts[1], parts[3]), dense):
        # matmul with other strides
        assert error(ours, expected.double()) <= (SLACK[dtype] if dtype == torch.float32 else 2**-8)
    assert all(torch.equal(x, y) for x, y in zip(parts[::2], before))


def test_no_tokens_are_no_error():
    gate, low = draw(0, 6), LowRank(draw(0, 4), draw(6, 4))
    assert ops.glu(gate, gate, "silu", low, low).shape == (0, 6)
    ops.glu_backward_(gate, gate, gate, "silu", low, low, low)


def test_wrong_terms_are_refused_in_one_line():
    x = draw(4, 6)
    refused = [
        LowRank(draw(4, 2), draw(6, 3)),
        LowRank(draw(3, 2), draw(6, 2)),
        LowRank(draw(4, 2), draw(2, 6)),
        LowRank(draw(4, 0), draw(6, 0)),
        LowRank(draw(4), draw(6)),
        LowRank(draw(4, 2), draw(6, 2).double()),
        LowRank(draw(4, 2, dtype=torch.bfloat16), draw(6, 2, dtype=torch.bfloat16)),
    ]
    for term in refused:
        for call in (
            lambda term=term: ops.glu(x, x, "silu", term),
            lambda term=term: ops.glu(x, x, "silu", up_add=term),
            lambda term=term: ops.glu_backward_(x, x, x, "silu", dh_add=term),
        ):
            with pytest.raises(EngineError) as caught:
                call()
            assert "\n" not in str(caught.value)
