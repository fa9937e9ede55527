"""A diverged trial ends at once: its loss is not finite or too high, or its gradient is zero."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.errors import DivergedError
from engine.training import loop as training
from engine.training.divergence import check_loss, check_step
from engine.training.loop import train
from engine.training.passes import Passes

VOCABULARY = 256


@pytest.mark.parametrize(
    ("loss", "grad_norm", "said"),
    [
        (math.nan, 1.0, "loss is nan"),
        (2.0, math.inf, "gradient norm is inf"),
        (2.0, 0.0, "gradient norm is 0"),
        (2.01 * math.log(VOCABULARY), 1.0, "exploded"),
    ],
)
def test_a_step_that_shows_divergence_is_refused(loss, grad_norm, said):
    with pytest.raises(DivergedError, match=said):
        check_step(loss, grad_norm, VOCABULARY)


@pytest.mark.parametrize(("loss", "grad_norm"), [(2.0, 1e-30), (0.0, 0.0), (1.1 * math.log(VOCABULARY), 100.0)])
def test_a_small_gradient_data_learned_by_heart_and_a_bad_model_are_not_divergence(loss, grad_norm):
    check_step(loss, grad_norm, VOCABULARY)


def test_an_evaluation_loss_must_be_a_number_below_the_limit():
    check_loss("eval_loss", 5.0, VOCABULARY)
    for loss in (math.nan, math.inf, 50.0):
        with pytest.raises(DivergedError, match="eval_loss"):
            check_loss("eval_loss", loss, VOCABULARY)


def test_a_learning_rate_that_leaves_no_gradient_ends_the_trial_and_gives_the_base_back(tiny_config, tmp_path):
    tiny_config["optim"] |= {"learning_rate": 300.0, "max_grad_norm": None}
    config = parse(TrainConfig, tiny_config)
    base = training.load_base(config.model, torch.device("cpu"))
    reports = []
    with pytest.raises(DivergedError, match="gradient norm is 0"):
        reports.extend(train(config, tmp_path, base=base))
    assert len(reports) < 3 and not any("lora" in name for name, _ in base.model.named_parameters())


def test_training_whose_loss_explodes_ends_within_a_step(tiny_config, tmp_path, monkeypatch):
    original = Passes.gradients

    def exploded(self, bins, step):
        found = original(self, bins, step)
        return replace(found, loss=10.0 * found.loss)

    monkeypatch.setattr(Passes, "gradients", exploded)
    with pytest.raises(DivergedError, match="has exploded: the limit is"):
        next(train(parse(TrainConfig, tiny_config), tmp_path))


def test_training_without_a_gradient_ends_within_a_step_and_with_one_does_not(tiny_config, tmp_path, monkeypatch):
    config = parse(TrainConfig, tiny_config)
    assert len(list(train(config, tmp_path / "as it is"))) == 3
    original = Passes.gradients

    def nothing(self, bins, step):
        found = original(self, bins, step)
        self.adapter.zero_grad()
        self.adapter.parameter.grad = torch.zeros_like(self.adapter.parameter)
        return found

    monkeypatch.setattr(Passes, "gradients", nothing)
    with pytest.raises(DivergedError, match="gradient norm is 0"):
        next(train(config, tmp_path / "without"))
