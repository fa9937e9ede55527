"""Test attention over packed samples, as in test_ops: three-way, with failing twins.

Operands are slices of one buffer, as a layer projects them. Rows hold several samples and tiles are
small, so tiles cross samples, windows and the diagonal in every way.

Shape letters: T tokens, H query heads, G key/value heads, K head dim.
"""

import pytest
import torch

from engine.errors import EngineError
from engine.kernels import ops
from engine.shape import compute_limits
from tests.support.kernel_checks import DEVICE, DTYPES, as_good_as_torch, draw, error
from tests.support.kernel_checks import implementation as implementation  # runs on kernel and reference

NAMES = ("out", "dq", "dk", "dv")
CASES = [  # lengths, window, H, G, K, softcap
    ((60, 1, 20), None, 2, 1, 32, 3.0),
    ((5, 0, 60, 3), 37, 2, 2, 24, 3.0),
    ((66,), None, 1, 1, 40, None),
    ((17, 40), 2, 1, 1, 16, 50.0),
    ((33, 9), None, 3, 1, 64, None),  # heads as SmolLM2's, which take these kernels on Hopper
    ((50, 3, 37), None, 4, 2, 144, 3.0),  # scores of such wide heads are stored in 16 bits
]


def operands(lengths, heads, groups, head_dim, dtype):
    """Return q, k and v as slices of one buffer, the gradient of the output, and the offsets."""
    num_tokens = sum(lengths)
    qkv = draw(num_tokens, (heads + 2 * groups) * head_dim, dtype=dtype, scale=2.0)
    parts = qkv.split([heads * head_dim, groups * head_dim, groups * head_dim], dim=1)
    q, k, v = (part.unflatten(1, (-1, head_dim)) for part in parts)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
    return (q, k, v), draw(num_tokens, heads, head_dim, dtype=dtype, seed=1), offsets


def ours(tensors, dout, offsets, window, scale, softcap):
    spans = ops.document_spans(offsets, dout.shape[0], window)
    out, lse = ops.attention(*tensors, spans, scale, softcap)
    return out, *ops.attention_backward(dout, *tensors, out, lse, spans, scale, softcap), lse


def plain(tensors, dout, offsets, window, scale, softcap, dtype):
    """Compute the same in `dtype` throughout, with a mask over the whole row."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in tensors)
    wide_k, wide_v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("thk,shk->hts", q, wide_k) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    t = torch.arange(q.shape[0], device=DEVICE)
    document = torch.bucketize(t, offsets.long(), right=True)
    age = t[:, None] - t
    seen = (age >= 0) & (document[:, None] == document) & (age < (window or q.shape[0]))
    scores = scores.masked_fill(~seen, float("-inf"))
    out = torch.einsum("hts,shk->thk", torch.softmax(scores, -1), wide_v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout.to(dtype)), torch.logsumexp(scores.detach(), -1)


def good(results, plains, truths):
    return [as_good_as_torch(*triple) for triple in list(zip(results, plains, truths))[:4]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "window", "heads", "groups", "head_dim", "softcap"), CASES)
def test_attention_is_as_good_as_torch(lengths, window, heads, groups, head_dim, softcap, dtype):
    tensors, dout, offsets = operands(lengths, heads, groups, head_dim, dtype)
    how = (offsets, window, 0.3, softcap)
    truths, plains = (plain(tensors, dout, *how, d) for d in (torch.float64, dtype))
    results = ours(tensors, dout, *how)
    assert [x.dtype for x in results] == [dtype] * 4 + [torch.float32]
    assert dict(zip(NAMES, good(results, plains, truths))) == dict.fromkeys(NAMES, True)
    assert error(results[4], truths[4]) < 2e-6


@pytest.mark.parametrize(("lengths", "window"), [((13, 22), None), ((25, 45), 20)])
def test_stored_scores_give_what_scores_made_again_do(lengths, window, monkeypatch):
    tokens, longest = sum(lengths), window or max(lengths)
    monkeypatch.setattr(compute_limits, "SCORE_BLOCK", 128 if DEVICE == "cuda" else 32)  # several blocks of a short row
    tensors, dout, offsets = operands(lengths, 4, 2, 144, torch.bfloat16)
    spans = ops.document_spans(offsets, tokens, window)
    given = dout, *tensors, *ops.attention(*tensors, spans, 0.3, 3.0), spans, 0.3, 3.0
    at_once = ops.attention_backward(*given)
    two_heads = 1 + 8 * compute_limits.score_cells(tokens, longest) // tokens  # of four
    monkeypatch.setattr(compute_limits, "SCORE_BYTES", two_heads)
    in_parts = ops.attention_backward(*given, longest)
    monkeypatch.setattr(compute_limits, "SCORE_BYTES", 0)
    again = ops.attention_backward(*given)
    for whole, part, other in zip(at_once, in_parts, again):
        assert torch.equal(whole, part) and error(whole, other.double()) < 1e-2


@pytest.fixture(scope="module")
def seen_alone():
    """Return operands of two samples with a window, and torch's results in fp32 and fp64."""
    tensors, dout, offsets = operands((20, 17), 2, 1, 16, torch.float32)
    how = (offsets, 12, 0.3, 3.0)
    return tensors, dout, how, *(plain(tensors, dout, *how, d) for d in (torch.float32, torch.float64))


@pytest.mark.parametrize(
    "wrong", [{0: [0, 21, 37]}, {0: [0, 37]}, {1: 13}, {1: None}, {2: 0.31}, {3: 3.1}, {3: None}], ids=str
)
def test_a_wrong_border_window_scale_or_softcap_is_seen_in_all_results(wrong, seen_alone):
    tensors, dout, how, plains, truths = seen_alone
    asked = [wrong.get(i, value) for i, value in enumerate(how)]
    asked[0] = torch.as_tensor(asked[0], dtype=torch.int32, device=DEVICE)
    assert good(ours(tensors, dout, *asked), plains, truths) == [False] * 4


def test_the_gradient_needs_the_slope_of_the_softcap(seen_alone):
    tensors, dout, (offsets, window, scale, softcap), plains, truths = seen_alone
    spans = ops.document_spans(offsets, dout.shape[0], window)
    out, lse = ops.attention(*tensors, spans, scale, softcap)
    right = (out, *ops.attention_backward(dout, *tensors, out, lse, spans, scale, softcap))
    without = (out, *ops.attention_backward(dout, *tensors, out, lse, spans, scale, None))
    assert good(right, plains, truths) == [True] * 4 and good(without, plains, truths) == [True, False, False, False]


def test_scores_far_beyond_the_softcap_stay_finite_and_their_gradients_keep_their_digits():
    tensors, dout, offsets = operands((33,), 1, 1, 16, torch.float32)
    tensors = (tensors[0] * 50.0, *tensors[1:])
    how = (offsets, None, 1.0, 30.0)
    truths = plain(tensors, dout, *how, torch.float64)
    assert (truths[4].abs() > 29.0).any()
    for result, truth in zip(ours(tensors, dout, *how), truths):
        assert error(result, truth) < 2e-5


def test_spans_cut_documents_to_the_window_and_read_int64_offsets_too():
    for dtype in (torch.int32, torch.int64):
        offsets = torch.tensor([0, 3, 3, 7], dtype=dtype, device=DEVICE)  # the last document has no offset of its own
        first, last = ops.document_spans(offsets, 9, 2).tolist()
        assert first == [0, 0, 1, 3, 3, 4, 5, 7, 7] and last == [1, 2, 2, 4, 5, 6, 6, 8, 8]
    first, last = ops.document_spans(offsets, 9).tolist()
    assert first == [0, 0, 0, 3, 3, 3, 3, 7, 7] and last == [2, 2, 2, 6, 6, 6, 6, 8, 8]


@pytest.mark.parametrize("shared_kib", [99, 163, 227])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 160, 256, 512])
def test_tiles_fit_into_the_shared_memory_of_a_block(head_dim, shared_kib):
    from engine.kernels.attention.document_attention import choose_tiles

    tiles, row = choose_tiles(head_dim, shared_kib * 1024), 2 * max(64, 1 << (head_dim - 1).bit_length())
    (m, n, _, stages), (dq_m, dq_n, _, dq_stages) = tiles.forward, tiles.dq
    rows = {"forward": m + 2 * stages * n, "dq": 2 * dq_m + 2 * dq_stages * dq_n}
    for name, own in (("both", 2), ("dk", 2), ("dv", 1)):
        if (tile := getattr(tiles, name)) is not None:
            rows[name] = own * tile[1] + 2 * tile[3] * tile[0]
    if tiles.scores is not None:
        (m, n, _, stages), (rows_at_once, keys, _, buffers) = tiles.scores, tiles.products
        rows["scores"] = 2 * m + 2 * stages * n + (stages > 1) * -(-m * n * 2 // row)  # its stores need a tile, or reuse a stage
        assert 2 * buffers * rows_at_once * (keys + 256) <= shared_kib * 1024
        assert {compute_limits.SCORE_BLOCK % size for size in (m, n, rows_at_once, keys)} == {0}
    made_again = set(rows) - {"scores"}
    assert made_again in ({"forward", "dq", "both"}, {"forward", "dq", "dk", "dv"})
    assert {name: number * row for name, number in rows.items() if number * row > shared_kib * 1024} == {}


def test_no_tokens_are_no_error():
    q, offsets = draw(0, 2, 16), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    out, *gradients, _ = ours((q, q, q), q, offsets, None, 1.0, 2.0)
    assert out.shape == (0, 2, 16) and all(x.shape == q.shape for x in gradients)


def test_what_the_kernels_cannot_read_is_refused_in_one_line():
    q, k = draw(4, 4, 16), draw(4, 2, 16)
    spans, lse = ops.document_spans(torch.tensor([0, 4], device=DEVICE), 4), draw(4, 4)
    calls = [
        lambda: ops.attention(q, draw(5, 2, 16), k, spans, 1.0),
        lambda: ops.attention(q, draw(4, 3, 16), draw(4, 3, 16), spans, 1.0),
        lambda: ops.attention(q, k, draw(4, 1, 16), spans, 1.0),
        lambda: ops.attention(q, k, k.double(), spans, 1.0),
        lambda: ops.attention(q, k, k.transpose(1, 2).contiguous().transpose(1, 2), spans, 1.0),
        lambda: ops.attention(*[draw(4, 1, 513)] * 3, spans, 1.0),
        lambda: ops.attention(q, k, k, spans.long(), 1.0),
        lambda: ops.attention(q, k, k, spans, 1.0, 0.0),
        lambda: ops.attention_backward(k, q, k, k, q, lse, spans, 1.0),
        lambda: ops.attention_backward(q, q, k, k, q, lse.t(), spans, 1.0),
        lambda: ops.document_spans(torch.zeros(2, device=DEVICE), 4),
        lambda: ops.document_spans(torch.tensor([0, 4], device=DEVICE), 4, 0),
    ]
    for call in calls:
        with pytest.raises(EngineError) as caught:
            call()
        assert "\n" not in str(caught.value)
