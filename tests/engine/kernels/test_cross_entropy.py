"""Test cross-entropy in place and rows by id like test_ops: three-way, with failing twins."""

import pytest
import torch

from engine.errors import EngineError
from engine.kernels import ops
from tests.support.kernel_checks import CUDA, DEVICE, DTYPES, SLACK, as_good_as_torch, draw, error
from tests.support.kernel_checks import implementation as implementation  # runs on kernel and reference

# less than a block, one block, one element more, three blocks
SHAPES_CV = [(3, 5), (4, 101), (2, 8192), (3, 8193), (2, 16_400)]
OPTIONS = [{}, {"scale": 0.25}, {"softcap": 5.0}, {"scale": 2.0, "softcap": 30.0}]
# every shape with every option, and both with every dtype
CASES = [(shape, DTYPES[(i + j) % 2], options) for i, shape in enumerate(SHAPES_CV) for j, options in enumerate(OPTIONS)]


def plain_cross_entropy(logits, labels, scale, softcap, dtype):
    """Return the loss of each row and the gradient of their sum, computed in `dtype` throughout."""
    leaf = logits.detach().to(dtype).requires_grad_()
    z = leaf * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    loss = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    loss.sum().backward()
    return loss.detach(), leaf.grad


def ours(logits, labels, scale=1.0, softcap=None):
    grad = logits.clone()
    return ops.cross_entropy_(grad, labels, scale, softcap), grad


def edge_labels(num_rows, vocabulary):
    labels = torch.randint(vocabulary, (num_rows,), generator=torch.Generator().manual_seed(1))
    labels[0], labels[-1] = 0, vocabulary - 1
    return labels.to(DEVICE)


@pytest.mark.parametrize(("shape", "dtype", "options"), CASES)
def test_loss_and_gradient_are_as_good_as_torch_and_a_wrong_label_scale_or_cap_is_seen(shape, dtype, options):
    logits, labels = draw(*shape, dtype=dtype, scale=3.0), edge_labels(*shape)
    scale, softcap = options.get("scale", 1.0), options.get("softcap")
    truths = plain_cross_entropy(logits, labels, scale, softcap, torch.float64)
    plains = plain_cross_entropy(logits, labels, scale, softcap, dtype)

    def good(loss, grad):
        assert loss.dtype == torch.float32 and grad.dtype == dtype
        # The loss is fp32 for any dtype of the logits, so it is compared with fp32, not torch's
        # bf16.
        return error(loss, truths[0]) < SLACK[torch.float32], as_good_as_torch(grad, plains[1], truths[1])

    assert all(good(*ours(logits, labels, scale, softcap)))
    assert not any(good(*ours(logits, (labels + 1) % shape[1], scale, softcap)))
    assert not any(good(*ours(logits, labels, scale * 1.25, softcap)))
    assert not any(good(*ours(logits, labels, scale, 1.0)))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_row_labelled_ignore_has_no_loss_and_no_gradient_and_leaves_the_others_alone(options):
    logits, labels = draw(4, 8193, scale=3.0), edge_labels(4, 8193)
    loss, grad = ours(logits, labels, **options)
    labels[1] = ops.IGNORE
    with_ignored, its_grad = ours(logits, labels, **options)
    others = torch.tensor([0, 2, 3], device=DEVICE)
    assert torch.equal(with_ignored[others], loss[others]) and torch.equal(its_grad[others], grad[others])
    assert with_ignored[1] == 0 and not its_grad[1].any() and loss[1] > 0 and grad[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_gradient_is_rounded_once(dtype, options):
    logits, labels = draw(4, 3001, dtype=dtype), edge_labels(4, 3001)
    _, grad = ours(logits, labels, **options)
    wide = plain_cross_entropy(logits, labels, options.get("scale", 1.0), options.get("softcap"), torch.float64)[1]
    assert (grad != wide.to(dtype)).double().mean() < 5e-3  # few elements are rounding ties
    assert (grad != (wide * 1.01).to(dtype)).double().mean() > 0.5


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_1e4_keep_their_digits(dtype, softcap):
    logits, labels = draw(4, 9001, dtype=dtype, scale=5e3), edge_labels(4, 9001)
    logits[:, 0], logits[1, 1], logits[2, 1] = 4e4, 4e4, 4e4 - 512  # the largest; in row 1 twice
    labels[1:3] = 1
    truth, truth_grad = plain_cross_entropy(logits, labels, 1.0, softcap, torch.float64)
    loss, grad = ours(logits, labels, 1.0, softcap)

    def good(loss):
        return bool(((loss - truth).abs() <= 2e-6 * truth.abs() + 5e-6).all())

    assert good(loss) and error(grad, truth_grad) < (5e-3 if dtype == torch.bfloat16 else 2e-5)
    if softcap is None:  # the formula as written loses them: 4e4 + log 2 in fp32 is off by 2e-3
        assert not good(torch.logsumexp(logits.float(), 1) - logits.float().gather(1, labels[:, None]).squeeze(1))


def test_one_class_costs_nothing():
    loss, grad = ours(draw(3, 1), edge_labels(3, 1))
    assert torch.equal(loss, torch.zeros_like(loss)) and torch.equal(grad, torch.zeros_like(grad))


def test_rows_may_be_strided_and_what_lies_between_them_is_left_alone():
    buffer, labels = draw(5, 80), edge_labels(5, 77)
    before = buffer.clone()
    loss = ops.cross_entropy_(buffer[:, :77], labels, 0.5, 4.0)
    dense_loss, dense_grad = ours(before[:, :77].contiguous(), labels, 0.5, 4.0)
    # unaligned rows add up in another order
    torch.testing.assert_close(loss, dense_loss, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(buffer[:, :77], dense_grad, rtol=2e-6, atol=1e-8)
    assert torch.equal(buffer[:, 77:], before[:, 77:]) and not torch.equal(buffer[:, :77], before[:, :77])


def test_without_gradient_the_loss_is_the_same_and_the_logits_stay():
    logits, labels = draw(3, 9001), edge_labels(3, 9001)
    before = logits.clone()
    loss = ops.cross_entropy_(logits, labels, 0.5, 4.0, with_gradient=False)
    assert torch.equal(logits, before)
    assert torch.equal(loss, ops.cross_entropy_(logits, labels, 0.5, 4.0)) and not torch.equal(logits, before)


def test_a_label_outside_the_vocabulary_is_a_nan_and_no_access(implementation):
    if implementation == "reference":
        pytest.skip("torch refuses it by itself")
    logits, labels = draw(3, 50), torch.tensor([2**40, 7, -101], device=DEVICE)
    loss, _ = ours(logits, labels)
    assert loss.isnan().tolist() == [True, False, True]


def test_no_rows_are_no_work():
    loss, grad = ours(draw(0, 7), torch.zeros(0, dtype=torch.int64, device=DEVICE))
    assert loss.shape == (0,) and grad.shape == (0, 7)


# --- rows by id


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (300, 576), (3, 5000)])
def test_gathered_rows_are_the_table_s_and_another_id_another_row(shape, dtype):
    table, ids = draw(*shape, dtype=dtype), edge_labels(9, shape[0])
    ids[3] = ids[4]
    rows = ops.gather_rows(table, ids)
    assert torch.equal(rows, table[ids]) and rows.is_contiguous()
    if shape[0] > 1:
        assert not torch.equal(ops.gather_rows(table, (ids + 1) % shape[0]), rows)


def test_the_table_s_rows_may_be_strided_and_no_ids_give_no_rows():
    wide, ids = draw(6, 40), edge_labels(4, 6)
    assert torch.equal(ops.gather_rows(wide[:, 8:29], ids), wide[ids, 8:29])
    assert ops.gather_rows(wide, ids[:0]).shape == (0, 40)


def test_an_id_outside_the_table_gives_zeros_and_no_access(implementation):
    if implementation == "reference":
        pytest.skip("torch refuses it by itself")
    table = draw(6, 40)
    rows = ops.gather_rows(table, torch.tensor([5, 6, -1, 2**40, 0], device=DEVICE))
    assert torch.equal(rows[[0, 4]], table[[5, 0]]) and torch.equal(rows[1:4], torch.zeros_like(rows[1:4]))


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_pinned_table_is_read_by_the_device_and_a_pageable_one_refused(implementation):
    if implementation == "reference":
        pytest.skip("index_select wants one device")
    table = draw(3000, 1024, dtype=torch.bfloat16).cpu()
    ids = edge_labels(500, 3000)
    rows = ops.gather_rows(table.pin_memory(), ids)
    assert rows.is_cuda and torch.equal(rows.cpu(), table[ids.cpu()])
    with pytest.raises(EngineError, match="pinned"):
        ops.gather_rows(table, ids)


def test_wrong_layouts_and_devices_are_refused_in_one_line():
    logits, labels, ids = draw(4, 6), edge_labels(4, 6), edge_labels(3, 4)
    refused = [
        lambda: ops.cross_entropy_(draw(6, 4).t(), labels),
        lambda: ops.cross_entropy_(draw(1, 6).expand(4, 6), labels),
        lambda: ops.cross_entropy_(draw(4), labels),
        lambda: ops.cross_entropy_(logits, labels.int()),
        lambda: ops.cross_entropy_(logits, labels[:3]),
        lambda: ops.cross_entropy_(logits, labels, softcap=0.0),
        lambda: ops.gather_rows(draw(6, 4).t(), ids),
        lambda: ops.gather_rows(logits, ids.int()),
        lambda: ops.gather_rows(logits, ids[None]),
        lambda: ops.gather_rows(logits.to("meta"), ids),
    ]
    for call in refused:
        with pytest.raises(EngineError) as caught:
            call()
        assert "\n" not in str(caught.value)
