"""Provide a fixture that several rooms of the engine use."""

import pytest


@pytest.fixture
def base(tiny_config):
    from engine.model.load import load_base
    from tests.support.trials import CPU, build

    return load_base(build(tiny_config).model, CPU)
