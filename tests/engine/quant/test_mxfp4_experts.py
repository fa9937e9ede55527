"""A gpt-oss in MXFP4, as it is released, is trained like its 16-bit copy."""

from __future__ import annotations

import pytest
import torch

from engine.config.trial import ModelConfig
from engine.errors import InputError
from engine.model.comparison import difference, our_losses, random_samples
from engine.model.inspect import inspect_model
from engine.model.load import load_base
from engine.quant.frozen_experts import frozen_experts
from tests.support.mxfp4_folders import save_mxfp4_pair
from tests.support.trials import CPU


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_mxfp4_pair(tmp_path_factory.mktemp("gpt-oss"))


def test_its_experts_and_losses_are_those_of_the_16_bit_copy(folders):
    given = [ModelConfig(path=str(folder), dtype="float32") for folder in folders]
    assert inspect_model(given[0]).features == inspect_model(given[1]).features
    bases = [load_base(one, CPU) for one in (*given, given[0])]  # the last from the shared cache
    experts = [dict(frozen_experts(base.model)) for base in bases]
    for name, module in experts[1].items():
        for weight in module.shapes:
            assert all(torch.equal(getattr(other[name], weight), getattr(module, weight)) for other in experts)
    samples = random_samples(200)
    losses = [our_losses(base, samples) for base in bases]
    assert difference(losses[0], losses[1]) < 1e-5 and difference(losses[0], losses[2]) < 1e-5


def test_where_it_cannot_be_used_one_line_says_so(folders):
    with pytest.raises(InputError, match=r"model.quantization = 'none': .* are MXFP4; allowed here: nf4"):
        inspect_model(ModelConfig(path=str(folders[0]), quantization="none"))
