"""Variants and pairs learn on the card, recorded, what they learn on the CPU."""

from __future__ import annotations

import copy

import pytest

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.model.load import load_base
from engine.training.loop import train
from engine.training.recordings import Recordings
from tests.support.preferences import pair_rows, preference_values, write_rows
from tests.support.trials import CPU

pytestmark = pytest.mark.gpu

DORA = {"lora": {"use_dora": True}}
DROPPED = {"lora": {"use_dora": True, "lora_dropout": 0.1}}
NOISE = {"train": {"neftune_noise_alpha": 5.0}}
KINDS = [
    {}, NOISE, {"lora": {"start": "pissa"}}, {"lora": {"start": "loftq"}}, DORA, DROPPED, {"optim": {"name": "muon"}},
    {"optim": {"name": "lion", "learning_rate": 3e-4}}, {"optim": {"loraplus_lr_ratio": 4.0}},
    {"lora": {"rank_pattern": {"down_proj": 2, "up_proj": 8}}},
]  # fmt: skip


def losses(values, folder, changes, device, dtype):
    """Return a trial's eval losses, and whether its steps were recorded."""
    values = copy.deepcopy(values)
    values["optim"] |= {"name": "adamw", "learning_rate": 3e-3}
    for section, fields in changes.items():
        values[section] |= fields
    values["model"] |= {"dtype": dtype}
    values["train"] |= {"device": device.type, "cuda_graphs": True if device.type == "cuda" else "auto"}
    config = parse(TrainConfig, values)
    base = load_base(config.model, device)
    folder.mkdir()
    return [report.eval_loss for report in train(config, folder, base=base)], len(Recordings.of(base)) > 0


def compare(values, folder, changes, dtype, apart):
    import torch

    ours, is_recorded = losses(values, folder / "card", changes, torch.device("cuda"), dtype)
    theirs, _ = losses(values, folder / "cpu", changes, CPU, "float32")
    assert is_recorded and ours[-1] < ours[0]
    assert ours == pytest.approx(theirs, abs=apart)


@pytest.mark.parametrize("changes", KINDS)
def test_a_recorded_variant_has_the_losses_of_the_cpu(tiny_config, tmp_path, changes):
    compare(tiny_config, tmp_path, changes, "float32", 0.01)


@pytest.mark.parametrize("changes", [DORA, DROPPED, NOISE])
def test_in_16_bits_it_has_them_up_to_rounding(tiny_config, tmp_path, changes):
    compare(tiny_config, tmp_path, changes, "auto", 0.05)


@pytest.mark.parametrize(("loss", "dtype", "apart"), [
    ("dpo", "float32", 0.005), ("orpo", "float32", 0.01), ("dpo", "auto", 0.05), ("orpo", "auto", 0.05),
])  # fmt: skip
def test_recorded_rows_of_pairs_have_the_losses_of_the_cpu(tiny_config, tmp_path, monkeypatch, loss, dtype, apart):
    monkeypatch.setenv("QLORA_SWEEP_CACHE", str(tmp_path / "cache"))
    values = preference_values(tiny_config, write_rows(tmp_path / "pairs.jsonl", pair_rows(32)), loss=loss, beta=0.5)
    values["train"] |= {"max_tokens": 1536, "num_reports": 2, "tokens_per_step": 512}
    compare(values, tmp_path, {}, dtype, apart)
