"""Variants and pairs learn on the card, recorded, what they learn on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.model.load import load_base
from engine.training.loop import train
from engine.training.recordings import Recordings
from tests.support.preferences import pair_rows, preference_values, write_rows
from tests.support.trials import CPU

pytestmark = pytest.mark.gpu

KINDS = [
    {}, {"lora": {"use_dora": True}}, {"lora": {"use_dora": True, "lora_dropout": 0.1}}, {"train": {"neftune_noise_alpha": 5.0}},
    {"lora": {"start": "pissa"}}, {"lora": {"start": "loftq"}}, {"optim": {"name": "muon"}},
    {"optim": {"name": "lion", "learning_rate": 3e-4}}, {"optim": {"loraplus_lr_ratio": 4.0}},
    {"lora": {"rank_pattern": {"down_proj": 2, "up_proj": 8}}},
]  # fmt: skip


def losses(values, folder, changes, device):
    """Return a trial's eval losses, and whether its steps were recorded. 16 bits on the card, 32 on the CPU."""
    values = copy.deepcopy(values)
    values["optim"] |= {"name": "adamw", "learning_rate": 3e-3}
    for section, fields in changes.items():
        values[section] |= fields
    values["train"] |= {"device": device.type, "cuda_graphs": True if device.type == "cuda" else "auto"}
    config = parse(TrainConfig, values)
    base = load_base(config.model, device)
    folder.mkdir()
    return [report.eval_loss for report in train(config, folder, base=base)], len(Recordings.of(base)) > 0


def compare(values, folder, changes):
    ours, is_recorded = losses(values, folder / "card", changes, torch.device("cuda"))
    theirs, _ = losses(values, folder / "cpu", changes, CPU)
    assert is_recorded and ours[-1] < ours[0]
    assert ours == pytest.approx(theirs, abs=0.05)


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_a_recorded_variant_has_the_losses_of_the_cpu(tiny_config, tmp_path, changes):
    compare(tiny_config, tmp_path, changes)


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_recorded_rows_of_pairs_have_the_losses_of_the_cpu(tiny_config, tmp_path, monkeypatch, loss):
    monkeypatch.setenv("QLORA_SWEEP_CACHE", str(tmp_path / "cache"))
    values = preference_values(tiny_config, write_rows(tmp_path / "pairs.jsonl", pair_rows(32)), loss=loss, beta=0.5)
    values["train"] |= {"max_tokens": 1536, "num_reports": 2, "tokens_per_step": 512}
    compare(values, tmp_path, {})
