"""`train.max_epochs` ends a trial by passes over the data, if that is before its tokens end."""

from __future__ import annotations

import pytest

from engine.config.trial import LoopConfig
from engine.data.views import load_data
from tests.support.trials import build, run, same_numbers


@pytest.mark.parametrize(
    ("given", "tokens", "grid"),
    [
        ({"max_epochs": 2.0}, 600, (200, 400, 600)),
        ({"max_epochs": 0.5}, 150, (50, 100, 150)),
        ({"max_epochs": 4.0}, 900, (300, 600, 900)),
        ({}, 900, (300, 600, 900)),
        ({"max_epochs": 1.0, "report_at_tokens": (100, 300, 700)}, 300, (100, 300)),
        ({"max_epochs": 1.0, "report_at_tokens": (400, 700)}, 300, (300,)),
    ],
)
def test_the_first_of_both_ends_the_trial_and_rungs_follow_from_it(given, tokens, grid):
    loop = LoopConfig(max_tokens=900, num_reports=3, **given).within_epochs(300)
    assert loop.max_tokens == tokens and loop.report_grid() == grid
    assert loop.within_epochs(300) == loop  # a sweep settles it, and its trials find the same


def test_a_trial_of_epochs_is_one_of_as_many_tokens(tiny_config, tmp_path, base):
    config = build(tiny_config, train={"max_epochs": 0.75})
    view, _ = load_data(config.data, base.tokenizer)
    tokens = int(0.75 * view.lengths.sum())
    assert tokens < config.train.max_tokens
    by_epochs = run(config, tmp_path / "epochs", base)
    by_tokens = run(build(tiny_config, train={"max_tokens": tokens}), tmp_path / "tokens", base)
    assert same_numbers(by_epochs, by_tokens) and by_epochs[-1].tokens_seen >= tokens
    assert config.fingerprint() != build(tiny_config).fingerprint()
