"""NF4 weights whose rows are no whole blocks have the values that were packed, on any CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.quant.bnb import library_linear, nf4_error, quantize_nf4
from engine.quant.frozen_linear import FrozenLinear
from tests.support.kernel_checks import draw

BLOCK = 64
GAP = 0.153  # of a block's largest value: half of the widest gap between two codes


def is_near(found: Tensor, weight_OD: Tensor) -> bool:
    """Return True if each value is as near to the weight's as a code can be."""
    apart, packed = (torch.zeros(-(-weight_OD.numel() // BLOCK), BLOCK) for _ in range(2))
    apart.view(-1)[: weight_OD.numel()] = (found.float() - weight_OD).flatten()
    packed.view(-1)[: weight_OD.numel()] = weight_OD.flatten()
    return bool((apart.abs() <= GAP * packed.abs().amax(1, keepdim=True)).all())


@pytest.mark.parametrize("shape", [(32, 96), (8, 160), (4, 32), (3, 48), (5, 66), (7, 131), (6, 64)], ids=str)
def test_a_frozen_layer_s_weight_is_the_one_that_was_packed(shape):
    weight = draw(*shape) * torch.linspace(0.1, 10.0, shape[0])[:, None]  # each row has another scale
    linear = library_linear(weight, torch.float32)
    linear.weight = quantize_nf4(weight, double_quantization=False)
    layer = FrozenLinear(linear)
    assert is_near(layer.dequantized(torch.float32), weight)
    assert is_near(weight - nf4_error(weight, double_quantization=False), weight)
    x = draw(2, shape[1], seed=1)
    assert torch.allclose(layer(x), x @ layer.dequantized(torch.float32).t(), atol=1e-4)
    assert not is_near(layer.dequantized(torch.float32).roll(1, 0), weight)  # the twin
