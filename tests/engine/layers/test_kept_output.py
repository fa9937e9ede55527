"""Layers that keep attention's output and log-sum on the host, and make its inputs again."""

import gc
import weakref

import pytest
import torch

from engine.adapter.lora import attach
from engine.config.trial import LoraConfig
from engine.layers import attention_half
from engine.layers.swap import set_policy
from engine.shape import compute_limits
from engine.shape.policies import Policy
from tests.support.fused_layers import batch, build, hidden_states, run, worst

SEVERAL = ["Llama", "Qwen3", "Gemma2", "Gemma4Text", "Gemma4Text with k = v", "SmolLM3", "Granite", "Olmo3", "Phi3", "Ministral3",
           "Glm4", "Qwen3_5Text"]  # fmt: skip
"""Norms of queries and keys, a softcap, keys that layers share, multipliers, rotation in part, a gate of the output."""


@pytest.fixture(autouse=True)
def long_rows(monkeypatch):
    """A row of 30 tokens takes several tiles."""
    monkeypatch.setattr(compute_limits, "MLP_TILE_TOKENS", 8)


@pytest.mark.parametrize("family", SEVERAL)
def test_gradients_are_bit_for_bit_those_of_layers_that_keep_all_of_attention(family):
    lora = LoraConfig(rank=3, lora_dropout=0.3)
    kept, again = (run(*build(family, "fused")[:2], lora, policy) for policy in (Policy.SELECTIVE, Policy.HOST))
    assert all(map(torch.equal, again, kept))


@pytest.mark.parametrize("targets", ["layers.1.self_attn.o_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"])
def test_any_first_adapter_has_the_same_gradients(targets):
    lora = LoraConfig(rank=3, target_modules=(targets,))
    kept, again = (run(*build("Qwen3", "fused")[:2], lora, policy) for policy in (Policy.SELECTIVE, Policy.HOST))
    assert all(map(torch.equal, again, kept))


def test_inputs_of_another_row_would_show(monkeypatch):
    lora, found = LoraConfig(rank=3), attention_half._found
    kept = run(*build("Llama", "fused")[:2], lora, Policy.SELECTIVE)
    monkeypatch.setattr(attention_half, "_found", lambda *given: found(*given).roll(1, -2))
    assert worst(run(*build("Llama", "fused")[:2], lora, Policy.HOST), kept) > 1e-2


@pytest.mark.parametrize(("family", "policy"), [("Llama", Policy.HOST), ("Qwen3", Policy.HOST), ("Llama", Policy.SELECTIVE)])
def test_nothing_but_output_and_log_sum_waits_for_the_backward_pass(family, policy, monkeypatch):
    model, names, _ = build(family, "fused")
    layers = attach(model.train(), names, LoraConfig(rank=3), 3)
    stash = set_policy(model, policy)
    given, attend = [], attention_half.attend

    def noting(*arguments):
        given.extend(weakref.ref(t.untyped_storage()) for t in arguments[:3])
        return attend(*arguments)

    monkeypatch.setattr(attention_half, "attend", noting)
    hidden = hidden_states(model, batch((30,)))
    gc.collect()
    alive = [ref for ref in given if ref() is not None]
    assert layers and len(given) == 9 and (not alive) == (policy is Policy.HOST)
    hidden.square().sum().backward()
    assert not stash._entries


def test_another_policy_uses_the_host_memory_that_is_there():
    model, names, _ = build("Llama", "fused")
    layers = attach(model.train(), names, LoraConfig(rank=3), 3)
    stash = set_policy(model, Policy.OFFLOAD, host_layers=2)
    hidden_states(model, batch()).square().sum().backward()
    memory, size = stash.memory, stash.memory.num_bytes
    assert layers and size > 0 and stash.num_layers == 3
    assert set_policy(model, Policy.KEEP, host_layers=1, stash=stash) is stash and stash.num_layers == 1
    hidden_states(model, batch()).square().sum().backward()
    assert stash.memory is memory and memory.num_bytes == size


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(512, 512), (700, 1, 323)])
def test_on_the_device_they_are_as_near_to_fp32_as_layers_that_keep_all_of_attention(lengths, monkeypatch):
    """The first row is a plain batch, the second one ragged: two kernels."""
    monkeypatch.setattr(compute_limits, "MLP_TILE_TOKENS", 256)
    lora, row = LoraConfig(rank=3), batch(lengths)

    def gradients(policy, dtype):
        model, names, _ = build("Qwen3", "fused", dtype)
        layers = attach(model, names, lora, 3)
        random = torch.Generator().manual_seed(2)
        for layer in layers.values():
            layer.lora_b.data.normal_(0, 0.2, generator=random)
        model.cuda().train()
        set_policy(model, policy)
        hidden = hidden_states(model, row.to(torch.device("cuda")))
        cotangent = torch.randn(hidden.shape, generator=random).cuda()
        parameters = [p for layer in layers.values() for p in (layer.lora_a, layer.lora_b)]
        return [g.float() for g in torch.autograd.grad((hidden.float() * cotangent).sum(), parameters)]

    truth = gradients(Policy.SELECTIVE, torch.float32)
    kept, again = (worst(gradients(policy, torch.bfloat16), truth) for policy in (Policy.SELECTIVE, Policy.HOST))
    assert again <= 1.05 * kept + 1e-3, (again, kept)
