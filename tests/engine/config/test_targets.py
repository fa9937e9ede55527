"""One rule matches layer names."""

import pytest

from engine.config.targets import resolve_targets
from engine.errors import InputError


def test_targets_are_matched_by_name_end_or_pattern():
    names = ["layers.0.attn.q_proj", "layers.0.attn.k_proj", "layers.0.mlp.up_proj", "layers.1.attn.q_proj"]
    assert resolve_targets(names, "all-linear") == names
    assert resolve_targets(names, ("q_proj", "mlp.up_proj")) == [names[0], names[2], names[3]]
    assert resolve_targets(names, "q_proj") == [names[0], names[3]]
    assert resolve_targets(names, r"layers\.0\..*") == names[:3]
    with pytest.raises(InputError, match="q_porj.*did you mean 'q_proj'"):
        resolve_targets(names, ("k_proj", "q_porj"))
    with pytest.raises(InputError, match="valid regular expression"):
        resolve_targets(names, "layers.(")
