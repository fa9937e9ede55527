"""Compare linear cross-entropy, value and gradient, with all logits in fp32."""

import pytest
import torch

from engine.kernels.ops import IGNORE
from engine.vocabulary import loss
from engine.vocabulary.head import Head
from engine.vocabulary.loss import linear_cross_entropy, linear_cross_entropy_reference


def inputs(n=37, d=24, v=101, ignored=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, d, generator=generator)
    labels = torch.randint(0, v, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < ignored] = IGNORE
    return h, labels, torch.randn(v, d, generator=generator)


def value_and_gradient(function, h, labels, head, *rows):
    h = h.clone().requires_grad_()
    value = function(h, labels, head, *rows)
    (value / 3).backward()
    return value.detach(), h.grad


@pytest.fixture(params=[1, 5, 1000])
def rows_per_chunk(request, monkeypatch):
    monkeypatch.setattr(loss, "LOSS_CHUNK_BYTES", 4 * 101 * request.param)


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


def target_rows(labels):
    return (labels != IGNORE).nonzero().squeeze(1)


@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_rows_known_to_the_caller_are_not_looked_for_and_change_nothing(rows_per_chunk, ignored, monkeypatch):
    h, labels, weight = inputs(ignored=ignored)
    head, rows = Head(weight, scale=0.5, softcap=4.0), target_rows(labels)
    found = value_and_gradient(linear_cross_entropy, h, labels, head)
    monkeypatch.setattr(torch.Tensor, "nonzero", None)  # it would make the host wait for the device
    given = value_and_gradient(linear_cross_entropy, h, labels, head, rows)
    assert all(torch.equal(a, b) for a, b in zip(found, given, strict=True))
    fewer = value_and_gradient(linear_cross_entropy, h, labels, head, rows[1:])
    assert fewer[0] < found[0] and torch.all(fewer[1][rows[0]] == 0) and torch.any(found[1][rows[0]] != 0)


def test_rows_that_all_have_a_target_are_read_where_they_lie(monkeypatch):
    h, labels, weight = inputs(ignored=0.0)
    read, chunk = [], loss._chunk
    monkeypatch.setattr(loss, "_chunk", lambda h_CD, *rest: read.append(h_CD.untyped_storage().data_ptr()) or chunk(h_CD, *rest))
    linear_cross_entropy(h, labels, Head(weight))
    labels[3] = IGNORE
    linear_cross_entropy(h, labels, Head(weight))
    assert [address == h.untyped_storage().data_ptr() for address in read] == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_chunks_hold_the_rows_that_fit_and_the_last_may_be_short(ignored, dtype, monkeypatch):
    h, labels, weight = inputs(ignored=ignored)
    h, num_rows, head = h.to(dtype), target_rows(labels).numel(), Head(weight.to(dtype))
    expected = value_and_gradient(linear_cross_entropy, h, labels, head)
    sizes, chunk = [], loss._chunk
    monkeypatch.setattr(loss, "_chunk", lambda h_CD, *rest: sizes.append(h_CD.shape[0]) or chunk(h_CD, *rest))
    for fit in (1, num_rows // 2, num_rows - 1, num_rows, num_rows + 1):
        sizes.clear()
        monkeypatch.setattr(loss, "LOSS_CHUNK_BYTES", h.element_size() * 101 * fit + 1)
        result = value_and_gradient(linear_cross_entropy, h, labels, head)
        assert sum(sizes) == num_rows and max(sizes) == min(fit, num_rows) and len(sizes) == -(-num_rows // fit)
        # A matmul of fewer rows may add up in another order.
        for ours, whole in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)


def test_a_budget_below_one_row_still_takes_one(monkeypatch):
    h, labels, weight = inputs()
    expected = linear_cross_entropy(h, labels, Head(weight))
    monkeypatch.setattr(loss, "LOSS_CHUNK_BYTES", 1)
    torch.testing.assert_close(linear_cross_entropy(h, labels, Head(weight)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"scale": 0.25}, {"scale": 2.0, "softcap": 5.0}])
def test_bf16_is_as_good_as_torch_in_bf16_and_another_scale_is_seen(options):
    h, labels, weight = inputs(n=64, d=48, v=307)
    h, weight = h.bfloat16(), weight.bfloat16()
    rows = target_rows(labels)

    def plain(dtype):
        leaf = h.detach().to(dtype).requires_grad_()
        z = leaf @ weight.to(dtype).T * options.get("scale", 1.0)
        z = z if "softcap" not in options else options["softcap"] * torch.tanh(z / options["softcap"])
        value = torch.nn.functional.cross_entropy(z, labels, ignore_index=IGNORE, reduction="sum")
        (value / 3).backward()
        return value.detach(), leaf.grad

    def errors(result):
        return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(result, plain(torch.float64), strict=True)]

    allowed = [e + 1e-4 for e in errors(plain(torch.bfloat16))]
    ours = errors(value_and_gradient(linear_cross_entropy, h, labels, Head(weight, **options), rows))
    assert all(a <= b for a, b in zip(ours, allowed, strict=True))
    wrong = Head(weight, **{**options, "scale": 1.25 * options.get("scale", 1.0)})
    wrong_errors = errors(value_and_gradient(linear_cross_entropy, h, labels, wrong, rows))
    assert not any(a <= b for a, b in zip(wrong_errors, allowed, strict=True))


def test_a_graph_kept_for_a_second_backward_gives_the_same_gradient_again():
    h, labels, weight = inputs()
    h.requires_grad_()
    value = linear_cross_entropy(h, labels, Head(weight)) / 3
    first, second = (torch.autograd.grad(value, h, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and torch.any(first != 0)


def test_without_a_gradient_to_come_none_is_made(monkeypatch):
    h, labels, weight = inputs()
    wanted, chunk = [], loss._chunk
    monkeypatch.setattr(loss, "_chunk", lambda *arguments: wanted.append(arguments[3]) or chunk(*arguments))
    value = linear_cross_entropy(h, labels, Head(weight))
    assert torch.equal(value, linear_cross_entropy(h.requires_grad_(), labels, Head(weight)).detach())
    assert wanted == [False, True]


@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_losses_of_single_targets_are_the_reference_s_in_the_order_that_was_asked_for(rows_per_chunk, ignored):
    h, labels, weight = inputs(ignored=ignored)
    head, order = Head(weight, scale=0.5, softcap=4.0), torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    for rows in (target_rows(labels), target_rows(labels)[3:], order):  # all rows in any order, those without a target too
        ours = loss.token_cross_entropy(h, labels, head, rows)
        alone = [linear_cross_entropy_reference(h[i : i + 1], labels[i : i + 1], head) for i in rows]
        torch.testing.assert_close(ours, torch.stack(alone), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.sum(), linear_cross_entropy(h, labels, head, rows), rtol=1e-6, atol=1e-6)
