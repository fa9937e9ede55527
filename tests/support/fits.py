"""Build configs for tests of which trial fits a card."""

from __future__ import annotations

from engine.config.parsing import parse
from engine.config.trial import TrainConfig

BASE = {"model": {"path": "m"}, "data": {"train": "t"}, "train": {"max_tokens": 400, "num_reports": 4}}


def config_with(**sections) -> TrainConfig:
    return parse(TrainConfig, {**BASE, **sections})
