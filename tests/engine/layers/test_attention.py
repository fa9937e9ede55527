"""Attention over a packed row treats each sample as if it were alone."""

import pytest
import torch

from engine.data.packing import collate
from engine.data.views import load_data
from engine.layers import attention, attention_half
from engine.vocabulary.loss import linear_cross_entropy
from tests.support.trials import build

SINKS = torch.tensor([0.5, -2.0, 3.0, 0.0])


def token_losses(base, samples):
    """Return the loss of every position of a packed row, one at a time."""
    batch = collate(samples)
    hidden = base.hidden_states(batch)
    keep = batch.labels_T != -100
    return torch.stack([linear_cross_entropy(h[None], y[None], base.head()) for h, y in zip(hidden[keep], batch.labels_T[keep])])


def test_packed_samples_have_the_losses_they_have_alone(tiny_config, base):
    view, _ = load_data(build(tiny_config).data, base.tokenizer)
    samples = [view[i] for i in range(4)]
    with torch.no_grad():
        packed = token_losses(base, samples)
        alone = torch.cat([token_losses(base, [sample]) for sample in samples])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_that_comparison_fails_when_attention_crosses_samples(tiny_config, base, monkeypatch):
    view, _ = load_data(build(tiny_config).data, base.tokenizer)
    samples = [view[i] for i in range(4)]
    honest = attention.attend

    def leaky(q, k, v, documents, options, sinks=None):
        return honest(q, k, v, attention.Documents((q.shape[0],), documents.offsets), options, sinks)

    with torch.no_grad():
        alone = torch.cat([token_losses(base, [sample]) for sample in samples])
        monkeypatch.setattr(attention_half, "attend", leaky)
        packed = token_losses(base, samples)
    assert not torch.allclose(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("window", "softcap", "sunk"),
    [(None, None, False), (5, None, False), (None, 4.0, False), (5, 4.0, False), (None, None, True), (5, None, True)],
)
def test_packed_attention_equals_masked_softmax_document_by_document(window, softcap, sunk):
    generator = torch.Generator().manual_seed(0)
    lengths = (7, 1, 12)
    q = torch.randn(1, 4, 20, 8, generator=generator)
    k, v = torch.randn(2, 1, 2, 20, 8, generator=generator)
    out, _ = attention.packed_attention(
        None, q, k, v, None, document_lengths=lengths, document_offsets=torch.tensor([0, 7, 8, 20]),
        scaling=0.3, sliding_window=window, softcap=softcap, s_aux=SINKS if sunk else None,
    )  # fmt: skip
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    age = torch.arange(20)[:, None] - torch.arange(20)
    seen = (age >= 0) & (document[:, None] == document) & (age < (window or 99))
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = q @ k.transpose(2, 3) * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sunk:
        scores = torch.cat([scores, SINKS.view(1, 4, 1, 1).expand(1, 4, 20, 1)], dim=-1)
    expected = torch.softmax(scores, -1)[..., :20] @ v
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_flash_attention_s_backward_pass_takes_the_sinks_in_the_output_and_the_log_sum_exp(window):
    """Repeat in plain torch what `_FlashWithSinks` asks of flash attention on CUDA."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, weights = torch.randn(4, 12, 4, 8, generator=generator, dtype=torch.float64)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    options = attention.AttentionOptions(0.3, window)
    documents = attention.Documents((12,), torch.tensor([0, 12]))
    out = attention.attend(q, k, v, documents, options, SINKS)
    wanted = torch.autograd.grad((out * weights).sum(), (q, k, v))
    with torch.no_grad():
        age = torch.arange(12)[:, None] - torch.arange(12)
        seen = (age >= 0) & (age < (window or 99))
        scores = torch.einsum("thk,shk->hts", q, k).mul(0.3).masked_fill(~seen, float("-inf"))
        plain = torch.einsum("hts,shk->thk", scores.softmax(-1), v)
        ours, lse_HT = attention.with_sinks(plain, scores.logsumexp(-1), SINKS.double())
        torch.testing.assert_close(ours, out.detach(), rtol=1e-5, atol=1e-6)
        for share, matches in ((lse_HT, True), (scores.logsumexp(-1), False)):  # twin: the plain log-sum-exp
            p_HTS = (scores - share.unsqueeze(-1)).exp()
            delta_HT1 = (weights * ours).sum(-1).T.unsqueeze(-1)
            ds = p_HTS * (torch.einsum("thk,shk->hts", weights, v) - delta_HT1) * 0.3
            dk, dv = (torch.einsum("hts,thk->shk", rows, by) for rows, by in ((ds, q), (p_HTS, weights)))
            found = torch.einsum("hts,shk->thk", ds, k), dk, dv
            assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, wanted)) == matches


@pytest.mark.parametrize(
    ("head", "window", "capability", "ours"),
    [(64, None, (9, 0), True), (128, None, (9, 0), False), (64, 37, (9, 0), False), (64, None, (8, 9), False),
     (64, None, (10, 0), False), (32, None, (9, 0), False)],
)  # fmt: skip
def test_our_kernels_take_ragged_rows_only_where_they_were_measured_faster(head, window, capability, ours):
    assert attention.tiles_are_faster(head, attention.AttentionOptions(None, window), capability) == ours


@pytest.mark.parametrize("sunk", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_attention_by_our_own_operation_equals_the_path_for_the_cpu_with_all_gradients(window, sunk):
    """`_Tiled` is what CUDA takes; here its operations run as their definition."""
    generator = torch.Generator().manual_seed(0)
    q, weights = torch.randn(2, 20, 4, 8, generator=generator)
    k, v = torch.randn(2, 20, 2, 8, generator=generator)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    documents = attention.Documents((7, 1, 12), torch.tensor([0, 7, 8, 20], dtype=torch.int32))
    sinks = SINKS if sunk else None

    def run(attend, softcap):
        out = attend(*leaves, sinks, documents, attention.AttentionOptions(0.3, window, softcap))
        return out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)

    def by_document(q, k, v, sinks, documents, options):
        return attention.attend(q, k, v, documents, options, sinks)

    wanted = run(by_document, 4.0)
    torch.testing.assert_close(run(attention._Tiled.apply, 4.0), wanted, rtol=1e-4, atol=1e-5)
    for found, other in zip(run(attention._Tiled.apply, 4.4), wanted):
        assert not torch.allclose(found, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("num_documents", "num_tokens", "many"), [
    (1, 131072, False), (64, 8192, False), (256, 8192, False), (257, 8192, True), (128, 1024, False), (129, 1024, True),
])  # fmt: skip
def test_samples_are_many_where_gaps_would_take_four_fifths_of_flash_attention_s_memory(num_documents, num_tokens, many):
    assert attention.are_many(num_documents, num_tokens) is many


@pytest.mark.gpu
@pytest.mark.parametrize(("window", "sunk"), [(None, False), (8, False), (None, True)])
def test_on_a_card_many_short_samples_take_the_memory_of_few_and_have_flash_attention_s_numbers(window, sunk, monkeypatch):
    generator, tokens, short = torch.Generator("cuda").manual_seed(0), 4096, (8,) * 512
    sinks = torch.linspace(-1.0, 1.0, 8, device="cuda") if sunk else None

    def run(lengths):
        offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
        documents = attention.Documents(lengths, offsets)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = attention.attend(*inputs, documents, attention.AttentionOptions(sliding_window=window), sinks)
        grads = torch.autograd.grad(out, inputs, cotangent)
        return [out, *grads], torch.cuda.max_memory_allocated() - before

    shapes = [(tokens, heads, 128) for heads in (8, 2, 2)]
    inputs = [torch.randn(s, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_() for s in shapes]
    cotangent = torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16, generator=generator)
    run(short)
    few, ours = run((1000, 1000, 1000, 1096))[1], run(short)
    monkeypatch.setattr(attention, "are_many", lambda *_: False)
    theirs = run(short)
    assert ours[1] < 1.2 * few < theirs[1]
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert (a - b).norm() < 0.01 * b.norm()
