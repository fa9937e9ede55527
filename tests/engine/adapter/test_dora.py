"""DoRA has the losses of PEFT's, fused and unfused, and its files are PEFT's."""

from __future__ import annotations

import pytest
import torch

from engine.adapter.flat import FlatAdapter
from engine.adapter.lora import LoraLinear, attach, detach
from engine.adapter.start import attach_started
from engine.config.trial import LoraConfig
from engine.data.packing import collate
from engine.data.views import load_data
from engine.errors import InputError
from engine.export.forms import export
from engine.kernels import ops
from engine.layers.projection_group import ProjectionGroup
from engine.model.load import load_base, nf4_load_config
from engine.prepare import prepare
from engine.quant.bnb import keep_as_stored
from engine.quant.frozen_linear import FrozenLinear
from engine.shape.policies import Policy
from engine.training.optim import make_optimizer
from tests.support.trials import CPU, build, mean_loss, run, run_stopped, same_numbers, take_step

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
STEPS = 12


def dora(tiny_config, **sections):
    lora = {"rank": 4, "target_modules": TARGETS, "use_dora": True, **sections.pop("lora", {})}
    return build(tiny_config, lora=lora, **sections)


def peft_model(config, adapter=None):
    from peft import LoraConfig as Theirs
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        config.model.path, quantization_config=nf4_load_config(True, torch.float32), device_map={"": "cpu"}, dtype=torch.float32
    )
    keep_as_stored(model)  # else the library repacks NF4 weights in evaluation on some CPUs
    if adapter is not None:
        return PeftModel.from_pretrained(model, str(adapter)).eval()
    lora = config.lora
    return get_peft_model(model, Theirs(r=lora.rank, lora_alpha=lora.alpha, target_modules=TARGETS, use_dora=True))


def loss_of(model, row):
    logits = model(input_ids=row.input_ids_T[None], use_cache=False).logits[0].float()
    return torch.nn.functional.cross_entropy(logits, row.labels_T, reduction="sum", ignore_index=-100) / row.num_targets


def our_curve(config, base, policy=Policy.KEEP):
    layers = attach_started(base.model, base.linear_names, config)
    start = {name: layer.lora_a.detach().clone() for name, layer in layers.items()}
    adapter, (view, _) = FlatAdapter(layers, base.dtype), load_data(config.data, base.tokenizer)
    optimizer, losses = make_optimizer(adapter.parameter, config.optim, adapter.num_a), []
    base.checkpoint_activations(policy)
    base.model.train()
    for step in range(STEPS):
        row = collate([view[(2 * step + i) % len(view)] for i in range(2)])
        losses.append(take_step(base, adapter, optimizer, row))
    lengths = {name: layer.base.dequantized(torch.float32).norm(dim=1) for name, layer in layers.items()}
    moved = max((layer.magnitude.detach() / lengths[name] - 1).abs().max().item() for name, layer in layers.items())
    detach(base.model, layers)
    return torch.tensor(losses), start, view, moved


def their_curve(config, start, view):
    model = peft_model(config)
    for name, a_RD in start.items():
        model.base_model.model.get_submodule(name).lora_A["default"].weight.data.copy_(a_RD)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=config.optim.learning_rate, weight_decay=0.0), []
    model.train()
    for step in range(STEPS):
        rows = [collate([view[(2 * step + i) % len(view)]]) for i in range(2)]
        loss = sum(loss_of(model, row) * row.num_targets for row in rows) / sum(row.num_targets for row in rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_steps_have_the_losses_of_peft_fused_recomputed_and_unfused(tiny_config, base):
    config = dora(tiny_config, lora={"use_rslora": False}, optim={"name": "adamw", "learning_rate": 1e-2})
    ours, start, view, moved = our_curve(config, base)
    theirs = their_curve(config, start, view)
    torch.testing.assert_close(ours, theirs, rtol=3e-4, atol=3e-4)
    assert theirs[-1] < theirs[0] - 0.2 and moved > 0.01
    torch.testing.assert_close(our_curve(config, base, Policy.RECOMPUTE)[0], ours, rtol=1e-4, atol=1e-4)
    unfused = load_base(config.model.model_copy(update={"layers": "original"}), CPU)
    torch.testing.assert_close(our_curve(config, unfused)[0], ours, rtol=3e-4, atol=3e-4)
    plain = config.model_copy(update={"lora": config.lora.model_copy(update={"use_dora": False})})
    layers = attach(base.model, base.linear_names, plain.lora, 0)
    assert all(layer.magnitude is None for layer in layers.values())
    detach(base.model, layers)


def layer_of(rank, dropout, number=0, out=24, bias=True):
    torch.manual_seed(number)
    base = FrozenLinear(torch.nn.Linear(16, out, bias=bias))
    layer = LoraLinear(base, LoraConfig(rank=rank, lora_dropout=dropout, use_dora=True), torch.Generator().manual_seed(1), number)
    torch.nn.init.normal_(layer.lora_b, std=0.3)
    layer.magnitude.data *= torch.rand(out) + 0.5
    return layer


def test_a_layer_with_dropout_is_peft_s_layer(base):
    from peft.tuners.lora import Linear

    layer = layer_of(3, 0.4)
    frozen = torch.nn.Linear(16, 24)
    frozen.load_state_dict({"weight": layer.base.weight, "bias": layer.base.bias})
    from peft import LoraConfig as Theirs

    theirs = Linear(frozen, "default", Theirs(r=3, lora_alpha=6, lora_dropout=0.4, use_dora=True), r=3, lora_alpha=6)
    theirs.lora_A["default"].weight.data.copy_(layer.lora_a)
    theirs.lora_B["default"].weight.data.copy_(layer.lora_b)
    theirs.lora_magnitude_vector["default"].weight.data.copy_(layer.magnitude)
    assert theirs.lora_dropout["default"].p == 0.4
    x = torch.randn(7, 16)
    for training in (True, False):
        layer.train(training), theirs.train(training)
        found = []
        for module in (layer, theirs):
            torch.manual_seed(3)
            found.append(module(x))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_group_has_outputs_and_gradients_of_autograd(dropout):
    layers = [layer_of(3, dropout), layer_of(2, dropout, 1, out=8)]
    noise = torch.tensor(ops.noise_of(9, dropout))
    for layer in layers:
        layer.noise = noise
        layer.train()
    plain = FrozenLinear(torch.nn.Linear(16, 4, bias=False))
    group = ProjectionGroup.of([*layers, plain], torch.float32)
    x = torch.randn(11, 16, requires_grad=True)
    dropped = x if not dropout else x * (ops.dropout(torch.ones(11, 16), noise, group.stream))
    wanted = []
    for layer in layers:
        gain = (layer.magnitude / layer.weight_norm())[None]
        weight = layer.base.weight
        exact = torch.linalg.norm(weight + layer.scaling * (layer.lora_b @ layer.lora_a), dim=1)
        torch.testing.assert_close(layer.weight_norm(), exact.detach(), rtol=1e-5, atol=1e-6)
        low = layer.scaling * dropped @ layer.lora_a.t() @ layer.lora_b.t()
        wanted.append(x @ weight.t() + layer.base.bias + (gain - 1) * (dropped @ weight.t()) + gain * low)
    wanted.append(x @ plain.weight.t())
    y = torch.cat(wanted, dim=1)
    low = group.low(x.detach())
    torch.testing.assert_close(group.forward(x.detach(), low), y, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y)
    parameters = [p for layer in layers for p in layer.parameters_of()]
    dx, *expected = torch.autograd.grad(y, [x, *parameters], dy)
    dlow = group.low_gradient(dy)
    torch.testing.assert_close(group.input_gradient(dy, dlow), dx, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(group.adapter_gradients(dy, dlow, x.detach(), low), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora", [{}, {"lora_dropout": 0.2, "start": "pissa"}])
def test_a_stopped_trial_goes_on_the_same_and_peft_reads_and_merges_its_adapter(tiny_config, tmp_path, base, lora):
    from transformers import AutoModelForCausalLM

    config = dora(tiny_config, lora=lora)
    whole = run(config, tmp_path / "whole", base)
    parts = run_stopped(config, tmp_path / "parts", base)
    assert same_numbers(whole, parts) and whole[-1].eval_loss < whole[0].eval_loss
    assert whole[0].num_trainable == prepare([config]).num_trainable[0]
    best = min(report.eval_loss for report in whole)
    _, view = load_data(config.data, base.tokenizer)
    model = peft_model(config, tmp_path / "whole/adapter")
    assert mean_loss(view, lambda row: loss_of(model, row).item()) == pytest.approx(best, abs=2e-4)
    export(tmp_path / "whole/adapter", "merged", tmp_path / "merged", config=config, measure=False)
    from peft import PeftModel

    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32), str(tmp_path / "whole/adapter")
    ).merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for (name, one), two in zip(ours.named_parameters(), merged.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=2**-7, atol=1e-4, msg=name)
    with pytest.raises(InputError, match="llama.cpp loads plain LoRA alone"):
        export(tmp_path / "whole/adapter", "gguf-adapter", tmp_path / "gguf", config=config, measure=False)


def test_int8_products_are_refused_and_dora_is_part_of_the_trial_s_identity(tiny_config):
    with pytest.raises(InputError, match=r"train\.matmul = 'int8': must be bf16 with lora\.use_dora"):
        dora(tiny_config, train={"matmul": "int8"})
    other = dora(tiny_config).lora.model_copy(update={"use_dora": False})
    assert dora(tiny_config).fingerprint() != dora(tiny_config).model_copy(update={"lora": other}).fingerprint()
