"""Whole trials on a tiny mixture: rank and targets, stops, exports, and the settings that are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from engine.adapter.portable import read_adapter
from engine.errors import InputError, Interrupted
from engine.evaluation.reevaluate import evaluate_adapter
from engine.model.load import load_base
from engine.prepare import prepare
from engine.training.loop import train
from tests.support.tiny_models import byte_tokenizer
from tests.support.trials import CPU, build, run, same_numbers

BOTH = ["attention", "experts"]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_experts": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2}  # fmt: skip


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("mixture"), byte_tokenizer()
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config_of(tiny_config, mixture, **lora):
    return build(tiny_config, model={"path": str(mixture)}, lora={"target_modules": BOTH, **lora})


def test_a_sweep_over_rank_and_targets_learns_and_counts_each_adapter(tiny_config, mixture, tmp_path):
    grid = [(1, "attention"), (4, "experts"), (4, BOTH)]
    configs = [config_of(tiny_config, mixture, rank=rank, target_modules=targets) for rank, targets in grid]
    facts = prepare(configs)
    attention, experts = (32 + 64) * 2 + (64 + 64) * 2, 4 * ((64 + 64) + (32 + 64))
    one = {"attention": 2 * attention, "experts": 2 * experts, str(BOTH): 2 * (attention + experts)}
    assert facts.num_trainable == [rank * one[str(targets)] for rank, targets in grid]
    assert any("experts, in NF4" in note for note in facts.model_notes)
    base = load_base(configs[0].model, CPU)
    losses = {}
    for number, (config, point) in enumerate(zip(configs, grid)):
        reports = run(config, tmp_path / str(number), base)
        losses[point[0], str(point[1])] = reports[-1].eval_loss
        assert reports[-1].eval_loss < reports[0].eval_loss
        assert (read_adapter(tmp_path / str(number) / "adapter").experts != []) == (point[1] != "attention")
    assert losses[4, str(BOTH)] < losses[1, "attention"]
    assert len(set(losses.values())) == len(grid)


def test_a_trial_that_is_stopped_goes_on_with_the_undisturbed_trial_s_numbers_and_bits(tiny_config, mixture, tmp_path):
    config = config_of(tiny_config, mixture)
    whole = run(config, tmp_path / "whole")
    calls, base = iter(range(1, 10**6)), load_base(config.model, CPU)
    (tmp_path / "pieces").mkdir()
    reports = []
    with pytest.raises(Interrupted):
        reports += train(config, tmp_path / "pieces", base=base, interrupted=lambda: next(calls) == 3)
    reports += train(config, tmp_path / "pieces", base=base)
    assert same_numbers(whole, reports)
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "pieces"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    again = evaluate_adapter(config, tmp_path / "pieces" / "adapter")
    assert again.eval_loss == pytest.approx(min(report.eval_loss for report in reports), abs=1e-6)


def test_a_second_stage_starts_from_an_adapter_with_experts(tiny_config, mixture, tmp_path):
    first = config_of(tiny_config, mixture, rank=2)
    ended = min(report.eval_loss for report in run(first, tmp_path / "first"))
    start = {"rank": 4, "start_from": str(tmp_path / "first" / "adapter")}
    still = build(
        tiny_config, model={"path": str(mixture)}, lora={"target_modules": BOTH, **start}, optim={"learning_rate": 1e-9}
    )
    prepare([still])
    assert run(still, tmp_path / "second")[0].eval_loss == pytest.approx(ended, abs=1e-4)


@pytest.mark.parametrize(
    ("lora", "line"),
    [
        ({"lora_dropout": 0.1}, r"lora.lora_dropout = 0.1: must be 0 with adapters on experts"),
        ({"target_modules": ["expert"]}, r"lora.target_modules = 'expert': matches no linear layer"),
    ],
)
def test_what_experts_cannot_have_is_one_line_before_anything_is_paid_for(lora, line, tiny_config, mixture):
    with pytest.raises(InputError, match=line):
        prepare([config_of(tiny_config, mixture, **lora)])
