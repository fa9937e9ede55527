"""Compare Qwen3.5 on a card with float32: packed rows through kernels of flash-linear-attention, and torch's operations."""

import numpy as np
import pytest
import torch

from engine.config.parsing import parse
from engine.config.trial import ModelConfig
from engine.layers.library.library_kernels import FLASH_LINEAR_ATTENTION, calls_kernels, use_torch_functions
from engine.model.comparison import as_sample, library_losses, our_losses
from engine.model.load import load_base
from tests.support.mixers import tune_nothing
from tests.support.tiny_models import byte_tokenizer

pytestmark = pytest.mark.gpu
SPREAD = 10.0  # of the output head's weights, so that the losses of tokens differ by nats


@pytest.mark.parametrize("lengths", [(300, 65, 1030), (64, 64, 2, 700)])
def test_losses_of_qwen35_are_as_near_to_float32_as_bf16_allows(tmp_path, lengths, monkeypatch):
    """As near as the library's own torch operations in bf16 are, each sample alone."""
    pytest.importorskip(f"{FLASH_LINEAR_ATTENTION}.ops.gated_delta_rule")
    tune_nothing(monkeypatch, FLASH_LINEAR_ATTENTION)
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        hidden_size=1024, intermediate_size=3584, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=256,
        linear_num_key_heads=16, linear_num_value_heads=32, vocab_size=260, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3_5ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(SPREAD)
        for layer in model.model.layers:  # else each layer adds a tiny part to the residual
            (layer.linear_attn.out_proj if hasattr(layer, "linear_attn") else layer.self_attn.o_proj).weight.mul_(4.0)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    samples = [as_sample(np.random.default_rng(n).integers(8, 250, n)) for n in lengths]

    truth, in_bf16 = (_by_torch(tmp_path / "model", dtype, samples) for dtype in (torch.float32, torch.bfloat16))
    base = load_base(parse(ModelConfig, {"path": str(tmp_path / "model"), "quantization": "none"}), torch.device("cuda"))
    if not calls_kernels(base.model, FLASH_LINEAR_ATTENTION):
        pytest.skip("flash-linear-attention refuses this card or this version of triton")
    with torch.no_grad():
        ours = our_losses(base, samples)

    def apart(losses):
        return float((torch.cat(losses) - torch.cat(truth)).square().mean().sqrt())

    assert torch.cat(truth).std() > 0.5
    assert apart(ours) < 1.5 * apart(in_bf16), (apart(ours), apart(in_bf16))
    print(f"root mean square difference from float32 in nats: ours {apart(ours):.5f}, torch's in bf16 {apart(in_bf16):.5f}")


def _by_torch(folder, dtype, samples):
    """Return the losses of each sample alone, by the library's torch operations in this dtype."""
    from transformers import Qwen3_5ForCausalLM

    model = Qwen3_5ForCausalLM.from_pretrained(folder, dtype=dtype).cuda()  # casting a made one would round its rotary table
    use_torch_functions(model)
    with torch.no_grad():
        return [library_losses(model, sample) for sample in samples]
