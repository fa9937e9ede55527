"""Check on a CUDA device the tiles that the card gets for large, odd and small shapes."""

import pytest
import torch

from engine.kernels.eight_bit import int8_ops, int8_reference
from engine.kernels.ops import LowRank

pytestmark = pytest.mark.gpu
SHAPES = [(4096, 6144, 4096), (1000, 4096, 14336), (2048, 1152, 576), (517, 1000, 1001), (5, 64, 96)]  # T, N, K


@pytest.mark.parametrize("sizes", SHAPES)
def test_a_product_on_the_card_is_exact_and_the_same_each_time(sizes):
    t, n, k = sizes
    torch.manual_seed(0)
    x, w = torch.randn(t, k, device="cuda", dtype=torch.bfloat16), torch.randn(n, k, device="cuda")
    a, b = int8_ops.quantize_rows(x), int8_ops.quantize_rows(w)
    c = int8_ops.matmul(a, b, torch.float32)
    assert torch.equal(c, int8_reference.matmul(a, b, torch.float32, None, None))
    assert torch.equal(c, int8_ops.matmul(a, b, torch.float32))
    assert 1e-3 < (c - x.float() @ w.t()).norm() / c.norm() < 0.03
    low, low_b = (torch.randn(rows, 16, device="cuda", dtype=torch.bfloat16) for rows in (t, n))
    y = int8_ops.matmul(a, b, torch.bfloat16, LowRank(low, low_b))
    truth = c.double() + low.double() @ low_b.double().t()
    assert (y - truth).norm() / truth.norm() < 2e-3 < (c - truth).norm() / truth.norm()


def test_a_product_is_recorded_in_a_graph():
    torch.manual_seed(0)
    x, w = (torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16) for rows in (512, 768))
    b = int8_ops.quantize_rows(w)

    def product():
        return int8_ops.matmul(int8_ops.quantize_rows(x, True), b, torch.bfloat16)

    product()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product()
    x.copy_(torch.randn_like(x))
    graph.replay()
    replayed = y.clone()
    assert torch.equal(replayed, product())
    x.neg_()
    assert not torch.equal(replayed, product())
