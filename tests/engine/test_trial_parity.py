"""Compare loss curves with PEFT on bitsandbytes' NF4 model: same data, start and optimizer."""

import copy

import pytest
import torch

from engine.adapter.flat import FlatAdapter
from engine.adapter.lora import attach
from engine.config.optim_section import OptimConfig
from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.data.packing import collate
from engine.data.views import load_data
from engine.model.load import load_base, nf4_load_config
from engine.shape.policies import Policy
from engine.training.optim import make_optimizer, set_learning_rate
from tests.support.trials import take_step

STEPS = 32
ADAMW = OptimConfig(name="adamw", learning_rate=1e-2)


@pytest.fixture
def config(tiny_config):
    values = copy.deepcopy(tiny_config)
    values["train"]["device"] = "cpu"
    values["lora"] = {"rank": 4, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], "use_rslora": True}
    return parse(TrainConfig, values)


def our_curve(config, layers_option="auto", perturb=0.0, device="cpu", seed=7, host_layers=0, optim=ADAMW):
    base = load_base(config.model.model_copy(update={"layers": layers_option}), torch.device(device))
    layers = attach(base.model, base.linear_names, config.lora, seed)
    start = {name: layer.lora_a.detach().clone() for name, layer in layers.items()}
    next(iter(layers.values())).lora_a.data += perturb
    adapter = FlatAdapter(layers, base.dtype)
    optimizer = make_optimizer(adapter.parameter, optim, adapter.num_a)
    set_learning_rate(optimizer, optim.learning_rate)
    view, _ = load_data(config.data, base.tokenizer)
    base.checkpoint_activations(Policy.of(config.train.activation_checkpointing), host_layers=host_layers)
    base.model.train()
    losses = []
    for step in range(STEPS):
        row = collate([view[(3 * step + i) % len(view)] for i in range(3)]).to(base.device)
        losses.append(take_step(base, adapter, optimizer, row))
    return torch.tensor(losses), start, view


def peft_curve(config, start, view, device="cpu", dtype=torch.float32, optim=ADAMW):
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer
    from transformers import AutoModelForCausalLM

    quantised = nf4_load_config(True, dtype)
    model = AutoModelForCausalLM.from_pretrained(
        config.model.path, quantization_config=quantised, device_map={"": device}, dtype=dtype
    )
    lora = config.lora
    model = get_peft_model(
        model,
        LoraConfig(r=lora.rank, lora_alpha=lora.alpha, use_rslora=lora.use_rslora, target_modules=list(lora.target_modules)),
    )
    for name, a_RD in start.items():
        model.base_model.model.get_submodule(name).lora_A["default"].weight.data.copy_(a_RD)
    rates = {"lr": optim.learning_rate, "loraplus_lr_ratio": optim.loraplus_lr_ratio}
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **rates, loraplus_weight_decay=optim.weight_decay)
    model.train()
    losses = []
    for step in range(STEPS):
        samples = [view[(3 * step + i) % len(view)] for i in range(3)]
        total, count = 0.0, 0
        for sample in samples:  # one at a time: no padding, no packing
            row = collate([sample]).to(torch.device(device))
            with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
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


def test_lora_plus_with_weight_decay_has_the_losses_of_peft_and_its_optimizer(config):
    optim = OptimConfig(name="adamw", learning_rate=2e-3, loraplus_lr_ratio=8.0, weight_decay=0.1)
    ours, start, view = our_curve(config, optim=optim)
    theirs = peft_curve(config, start, view, optim=optim)
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
    plain, _, _ = our_curve(config, optim=optim.model_copy(update={"loraplus_lr_ratio": 1.0}))
    assert theirs[-1] < theirs[0] - 0.5 and not torch.allclose(ours, plain, rtol=2e-4, atol=2e-4)


def test_unfused_layers_have_the_same_curve(config):
    torch.testing.assert_close(our_curve(config)[0], our_curve(config, "original")[0], rtol=2e-4, atol=2e-4)


def test_that_comparison_fails_for_a_slightly_different_start(config):
    ours, _, _ = our_curve(config)
    other, _, _ = our_curve(config, perturb=0.02)
    assert not torch.allclose(ours, other, rtol=2e-4, atol=2e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("checkpointing", "host_layers"), [(False, 0), ("selective", 0), (True, 0), ("offload", 1)])
def test_32_steps_in_bf16_are_as_near_to_fp32_as_those_of_peft_and_within_its_seed_spread(config, checkpointing, host_layers):
    """The reference is the library's fp32 curve.

    The limits are the library's own distances from it: its bf16 curve, and its curve from another
    start.
    """

    def mean_distance(a, b):
        return float((a - b).abs().mean())

    update = {"train": config.train.model_copy(update={"activation_checkpointing": checkpointing})}
    ours, start, view = our_curve(config.model_copy(update=update), device="cuda", host_layers=host_layers)
    truth = peft_curve(config, start, view, "cuda")
    theirs = peft_curve(config, start, view, "cuda", torch.bfloat16)
    _, other_start, _ = our_curve(config, seed=8)
    spread = mean_distance(peft_curve(config, other_start, view, "cuda"), truth)
    assert theirs[-1] < theirs[0] - 0.5
    assert mean_distance(ours, truth) < 1.5 * mean_distance(theirs, truth) + 1e-3
    assert mean_distance(ours, truth) < spread
