"""Rows of unequal samples that run out of memory at any moment cost speed, and no step, report or sample."""

from __future__ import annotations

import json
import random

import pytest
import torch

from engine.model.base import Base
from engine.model.load import load_base
from engine.training.loop import train
from tests.support.trials import CPU, build, memory_ends_at, run

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]
STEP = 512


def ragged(tiny_config, folder, seed):
    """Return a config whose samples have 2 to 128 tokens, most of them few."""
    rng, file = random.Random(seed), folder / "ragged.jsonl"
    texts = ["".join(rng.choices("abcdef ", k=min(120, 1 + int(rng.lognormvariate(3.2, 1.0))))) for _ in range(160)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    fixed = {"tokens_per_step": STEP, "micro_batch_size": 4, "activation_checkpointing": False, "keep_layers": 0}
    return build(tiny_config, data={"train": str(file), "eval": None, "format": "text", "max_seq_length": 128}, train=fixed)


def compare(found, expected):
    assert [(r.rung, r.tokens_seen, r.step) for r in found] == [(r.rung, r.tokens_seen, r.step) for r in expected]
    assert [r.eval_loss for r in found] == pytest.approx([r.eval_loss for r in expected], rel=1e-4)


@pytest.mark.parametrize("most", [300, 200, 140])
@pytest.mark.parametrize("seed", range(3))
def test_a_card_that_is_too_small_for_the_plan_trains_the_same_steps(tiny_config, tmp_path, monkeypatch, seed, most):
    config = ragged(tiny_config, tmp_path, seed)
    expected = run(config, tmp_path / "room")
    memory_ends_at(monkeypatch, most)
    found = run(config, tmp_path / "tight")
    compare(found, expected)
    assert found[0].num_out_of_memory and found[-1].micro_batch_size < 4 and not expected[-1].num_out_of_memory


@pytest.mark.parametrize("calls", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(2))
def test_memory_that_another_process_takes_in_the_middle_costs_no_step(tiny_config, tmp_path, monkeypatch, seed, calls):
    """From that pass on, rows above 200 tokens do not fit; the trial is stopped after a rung, too, and goes on."""
    config = ragged(tiny_config, tmp_path, seed)
    expected, whole, done = run(config, tmp_path / "room"), Base.loss, []

    def loss(self, batch):
        done.append(1)
        if len(done) >= calls and torch.is_grad_enabled() and batch.num_tokens > 200:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, batch)

    monkeypatch.setattr(Base, "loss", loss)
    base = load_base(config.model, CPU)
    (tmp_path / "tight").mkdir()
    first = train(config, tmp_path / "tight", base=base)
    found = [next(first)]
    first.close()
    found += train(config, tmp_path / "tight", base=base)
    compare(found, expected)
    assert found[-1].num_out_of_memory
