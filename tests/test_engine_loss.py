"""Linear cross-entropy: value and gradient against all logits in fp32."""

import pytest
import torch

from engine import loss
from engine.loss import IGNORE, Head, linear_cross_entropy, linear_cross_entropy_reference


def inputs(n=37, d=24, v=101, ignored=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, d, generator=generator)
    labels = torch.randint(0, v, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < ignored] = IGNORE
    return h, labels, torch.randn(v, d, generator=generator)


def value_and_gradient(function, h, labels, head):
    h = h.clone().requires_grad_()
    value = function(h, labels, head)
    (value / 3).backward()
    return value.detach(), h.grad


@pytest.fixture(params=[1, 5, 1000])
def rows_per_chunk(request, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * 101 * request.param)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"scale": 0.25}, {"scale": 2.0, "softcap": 5.0}, {"bias": True}])
def test_value_and_gradient_equal_the_reference(rows_per_chunk, options):
    h, labels, weight = inputs()
    bias = torch.randn(weight.shape[0]) if options.pop("bias", False) else None
    head = Head(weight, bias, **options)
    value, grad = value_and_gradient(linear_cross_entropy, h, labels, head)
    expected, expected_grad = value_and_gradient(linear_cross_entropy_reference, h, labels, head)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)
    assert torch.all(grad[labels == IGNORE] == 0)


def test_the_comparison_fails_where_one_label_is_wrong():
    h, labels, weight = inputs(ignored=0.0)
    wrong = labels.clone()
    wrong[0] = (wrong[0] + 1) % weight.shape[0]
    value, _ = value_and_gradient(linear_cross_entropy, h, wrong, Head(weight))
    expected, _ = value_and_gradient(linear_cross_entropy_reference, h, labels, Head(weight))
    assert not torch.allclose(value, expected, rtol=1e-5, atol=1e-5)


def test_no_target_gives_zero_loss_and_zero_gradient():
    h, labels, weight = inputs()
    value, grad = value_and_gradient(linear_cross_entropy, h, torch.full_like(labels, IGNORE), Head(weight))
    assert value == 0 and torch.all(grad == 0)
