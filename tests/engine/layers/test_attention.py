"""Attention over a packed row treats each sample as if it were alone."""

import pytest
import torch

from engine.data.packing import collate
from engine.data.views import load_data
from engine.layers import attention, attention_half
from engine.layers.loss import linear_cross_entropy
from tests.support.trials import build


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

    def leaky(q, k, v, documents, options):
        return honest(q, k, v, attention.Documents((q.shape[0],), documents.offsets), options)

    with torch.no_grad():
        alone = torch.cat([token_losses(base, [sample]) for sample in samples])
        monkeypatch.setattr(attention_half, "attend", leaky)
        packed = token_losses(base, samples)
    assert not torch.allclose(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 4.0), (5, 4.0)])
def test_packed_attention_equals_masked_softmax_document_by_document(window, softcap):
    generator = torch.Generator().manual_seed(0)
    lengths = (7, 1, 12)
    q = torch.randn(1, 4, 20, 8, generator=generator)
    k, v = torch.randn(2, 1, 2, 20, 8, generator=generator)
    out, _ = attention.packed_attention(
        None, q, k, v, None, document_lengths=lengths, document_offsets=torch.tensor([0, 7, 8, 20]),
        scaling=0.3, sliding_window=window, softcap=softcap,
    )  # fmt: skip
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    age = torch.arange(20)[:, None] - torch.arange(20)
    seen = (age >= 0) & (document[:, None] == document) & (age < (window or 99))
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = q @ k.transpose(2, 3) * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    expected = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1) @ v
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
