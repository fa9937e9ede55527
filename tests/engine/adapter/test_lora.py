"""LoRA is attached to the base model's layers only once."""

import pytest

from engine.adapter.lora import attach, detach
from tests.support.trials import build


def test_an_adapter_cannot_be_attached_twice(tiny_config, base):
    config = build(tiny_config)
    layers = attach(base.model, base.linear_names, config.lora, 0)
    with pytest.raises(RuntimeError, match="still attached"):
        attach(base.model, base.linear_names, config.lora, 0)
    detach(base.model, layers)
