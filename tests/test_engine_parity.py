"""Loss curves beside the library stack: PEFT's adapter on bitsandbytes' NF4 model, same data, same start, same optimizer."""

import copy

import pytest
import torch

from engine.config import TrainConfig, parse
from engine.data import load_data
from engine.lora import FlatAdapter, attach
from engine.loss import linear_cross_entropy
from engine.model import load_base, nf4_load_config
from engine.packing import collate

STEPS = 32


@pytest.fixture
def config(tiny_config):
    values = copy.deepcopy(tiny_config)
    values["train"]["device"] = "cpu"
    values["lora"] = {"rank": 4, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], "use_rslora": True}
    return parse(TrainConfig, values)


def our_curve(config, layers_option="auto", perturb=0.0):
    base = load_base(config.model.model_copy(update={"layers": layers_option}), torch.device("cpu"))
    layers = attach(base.model, base.linear_names, config.lora, 7)
    start = {name: layer.lora_a.detach().clone() for name, layer in layers.items()}
    next(iter(layers.values())).lora_a.data += perturb
    adapter = FlatAdapter(layers, base.dtype)
    optimizer = torch.optim.AdamW([adapter.parameter], lr=1e-2, weight_decay=0.0)
    view, _ = load_data(config.data, base.tokenizer)
    base.model.train()
    losses = []
    for step in range(STEPS):
        row = collate([view[(3 * step + i) % len(view)] for i in range(3)])
        loss = linear_cross_entropy(base.hidden_states(row), row.labels_T, base.head()) / row.num_targets
        loss.backward()
        optimizer.step()
        adapter.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses), start, view


def peft_curve(config, start, view):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    quantised = nf4_load_config(True, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        config.model.path, quantization_config=quantised, device_map="cpu", dtype=torch.float32
    )
    lora = config.lora
    model = get_peft_model(
        model,
        LoraConfig(r=lora.rank, lora_alpha=lora.alpha, use_rslora=lora.use_rslora, target_modules=list(lora.target_modules)),
    )
    for name, a_RD in start.items():
        model.base_model.model.get_submodule(name).lora_A["default"].weight.data.copy_(a_RD)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    model.train()
    losses = []
    for step in range(STEPS):
        samples = [view[(3 * step + i) % len(view)] for i in range(3)]
        total, count = 0.0, 0
        for sample in samples:  # one at a time: no padding, no packing
            row = collate([sample])
            logits = model(input_ids=row.input_ids_T[None], use_cache=False).logits[0].float()
            total = total + torch.nn.functional.cross_entropy(logits, row.labels_T, reduction="sum", ignore_index=-100)
            count += row.num_targets
        loss = total / count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_32_steps_have_the_losses_of_peft_and_bitsandbytes(config):
    ours, start, view = our_curve(config)
    theirs = peft_curve(config, start, view)
    assert theirs[-1] < theirs[0] - 0.5  # nats: it learns, so the curve means something
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


def test_unfused_layers_have_the_same_curve(config):
    torch.testing.assert_close(our_curve(config)[0], our_curve(config, "original")[0], rtol=2e-4, atol=2e-4)


def test_that_comparison_fails_for_a_slightly_different_start(config):
    ours, _, _ = our_curve(config)
    other, _, _ = our_curve(config, perturb=0.02)
    assert not torch.allclose(ours, other, rtol=2e-4, atol=2e-4)
