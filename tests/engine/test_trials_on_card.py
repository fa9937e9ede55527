"""Variants, pairs and mixtures learn on the card, recorded, what they learn on the CPU; so do the families' layers."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.model.load import load_base
from engine.training.loop import train
from engine.training.recordings import Recordings
from tests.support.model_families import MIXTURE_OF_GEMMA4, judge, kind
from tests.support.preferences import pair_rows, preference_values, write_rows
from tests.support.trials import CPU

pytestmark = pytest.mark.gpu

KINDS = [
    {}, {"lora": {"use_dora": True}}, {"lora": {"use_dora": True, "lora_dropout": 0.1}}, {"train": {"neftune_noise_alpha": 5.0}},
    {"lora": {"start": "pissa"}}, {"lora": {"start": "loftq"}}, {"optim": {"name": "muon"}},
    {"optim": {"name": "lion", "learning_rate": 3e-4}}, {"optim": {"loraplus_lr_ratio": 4.0}},
    {"lora": {"rank_pattern": {"down_proj": 2, "up_proj": 8}}}, {"lora": {"alpha_pattern": {"down_proj": 2.0, "q_proj": 24.0}}},
    {"lora": {"alpha_pattern": {"down_proj": 2.0, "q_proj": 24.0}, "use_dora": True, "lora_dropout": 0.1}},
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


@pytest.fixture
def wide_mixture_dir(tiny_mixture_dir, tmp_path):
    """Experts of 64 features: narrower ones take plain torch, which asks the device where their rows end."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = shutil.copytree(tiny_mixture_dir, tmp_path / "mixture")
    config = AutoConfig.from_pretrained(folder, moe_intermediate_size=64)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("targets", ["attention", "experts", ["attention", "experts"], "all-linear"], ids=str)
def test_a_recorded_mixture_has_the_losses_of_the_cpu(tiny_config, wide_mixture_dir, tmp_path, targets):
    compare(tiny_config, tmp_path, {"model": {"path": str(wide_mixture_dir)}, "lora": {"target_modules": targets}})


def test_experts_of_other_alphas_have_the_losses_of_the_cpu(tiny_config, wide_mixture_dir, tmp_path):
    lora = {"target_modules": ["attention", "experts"], "alpha_pattern": {"experts.down_proj": 24.0, "q_proj": 2.0}}
    compare(tiny_config, tmp_path, {"model": {"path": str(wide_mixture_dir)}, "lora": lora})


@pytest.mark.parametrize(
    ("model_type", "numbers"),
    [
        ("gpt_oss", {}), ("qwen3_moe", {}), ("mixtral", {}), ("olmoe", {}), ("qwen3_5_moe_text", {}),
        ("gemma4_text", MIXTURE_OF_GEMMA4),
    ],
)  # fmt: skip
def test_a_mixture_s_losses_and_gradients_on_the_card_are_the_library_s(model_type, numbers):
    """In fp32 with experts in NF4, compared there as the guard compares them on the CPU."""
    verdict, there = judge(model_type, numbers, torch.device("cuda")), judge(model_type, numbers)
    assert verdict.experts and kind(verdict) == kind(there)
    assert not verdict.without_gradient
