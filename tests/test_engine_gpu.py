"""What only a CUDA device shows: variable-length flash attention, bf16 training, 8-bit optimizer states through a checkpoint."""

import copy

import pytest
import torch

from engine import attention
from engine.config import TrainConfig, parse
from engine.evaluate import evaluate_adapter
from engine.train import train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("groups", [1, 4])
def test_flash_and_reference_attention_agree_within_bf16(window, groups):
    torch.manual_seed(0)
    lengths = (130, 1, 400, 64)
    offsets = torch.tensor([0, 130, 131, 531, 595], dtype=torch.int32, device="cuda")
    q = torch.randn(1, 8, 595, 64, device="cuda", requires_grad=True)
    k, v = (torch.randn(1, 8 // groups, 595, 64, device="cuda", requires_grad=True) for _ in range(2))
    weights = torch.randn(1, 595, 8, 64, device="cuda")

    def run(dtype, softcap=None):
        out, _ = attention.packed_attention(
            None, q.to(dtype), k.to(dtype), v.to(dtype), None, document_lengths=lengths, document_offsets=offsets,
            scaling=0.125, sliding_window=window, softcap=softcap,
        )  # fmt: skip
        grads = torch.autograd.grad((out.float() * weights).sum(), (q, k, v))
        return [out.float(), *grads]

    assert attention._flash_fits(q.bfloat16(), None)
    for ours, truth in zip(run(torch.bfloat16), run(torch.float32)):
        assert (ours - truth).norm() / truth.norm() < 1e-2
    for ours, other in zip(run(torch.bfloat16), run(torch.float32, softcap=1.0)):  # the bound can fail
        assert (ours - other).norm() / other.norm() > 1e-2


@pytest.fixture
def config(tiny_config):
    values = copy.deepcopy(tiny_config)
    values["train"].update(device="cuda", activation_checkpointing=True)
    values["lora"]["lora_dropout"] = 0.1
    return parse(TrainConfig, values)


def test_a_trial_on_cuda_learns_and_its_exported_adapter_has_its_loss(config, tmp_path):
    reports = list(train(config, tmp_path))
    assert reports[-1].eval_loss < reports[0].eval_loss
    measured = evaluate_adapter(config, tmp_path / "adapter")
    assert measured["eval_loss"] == pytest.approx(min(r.eval_loss for r in reports), rel=1e-3)


def test_a_trial_stopped_and_continued_on_cuda_goes_on_with_the_same_numbers(config, tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = [r.eval_loss for r in train(config, tmp_path / "whole")]
    parts = []
    for _ in range(3):
        generator = train(config, tmp_path / "parts")
        parts.append(next(generator).eval_loss)
        generator.close()
    assert parts == pytest.approx(whole, rel=1e-3)


def test_a_trial_gives_its_memory_back(config, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    list(train(config, tmp_path / "one"))
    before = torch.cuda.memory_allocated()
    list(train(config, tmp_path / "two"))
    assert torch.cuda.memory_allocated() <= before
