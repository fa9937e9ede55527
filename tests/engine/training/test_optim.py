"""Optimizers and schedules agree with the libraries that define them, and resume exactly."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

from engine.adapter.flat import FlatAdapter
from engine.adapter.lora import attach, detach
from engine.config.optim_section import OptimConfig
from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.errors import CheckpointError, InputError, Interrupted
from engine.quant import host_states
from engine.training.loop import train
from engine.training.optim import learning_rate, make_optimizer, set_learning_rate
from tests.support.trials import build, run, same_numbers

GOOD = {"model": {"path": "m"}, "data": {"train": "d"}, "train": {"max_tokens": 100}}


def optim_of(**values) -> OptimConfig:
    return parse(TrainConfig, {**GOOD, "optim": values}).optim


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_wsd_is_the_schedule_of_transformers(floor):
    from transformers.optimization import get_wsd_schedule

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = get_wsd_schedule(
        optimizer, num_warmup_steps=0, num_stable_steps=700, num_decay_steps=300, decay_type="1-sqrt", min_lr_ratio=floor
    )
    ours = optim_of(learning_rate=3e-4, lr_schedule="wsd", decay_ratio=0.3, warmup_ratio=0.0, min_lr_ratio=floor)
    for step in range(1000):
        assert learning_rate(ours, step / 1000) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-18), step
        optimizer.step()
        theirs.step()


def test_wsd_warms_up_stays_and_decays():
    optim = optim_of(learning_rate=1.0, lr_schedule="wsd", warmup_ratio=0.1, decay_ratio=0.2)
    assert [learning_rate(optim, at) for at in (0.05, 0.1, 0.5, 0.8)] == pytest.approx([0.5, 1.0, 1.0, 1.0])
    assert learning_rate(optim, 0.85) == pytest.approx(0.5) and 0.0 < learning_rate(optim, 1.0 - 1e-9) < 1e-8


def test_a_decay_that_overlaps_the_warm_up_is_one_line():
    with pytest.raises(InputError, match=r"optim\.decay_ratio = 0\.95: must be at most 0\.9 with optim\.warmup_ratio = 0\.1"):
        optim_of(lr_schedule="wsd", warmup_ratio=0.1, decay_ratio=0.95)
    assert optim_of(lr_schedule="cosine", warmup_ratio=0.1, decay_ratio=0.95)  # there it has no effect


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "lion"])
def test_lora_plus_gives_b_its_own_rate_and_leaves_a_as_it_is_without(tiny_config, base, name):
    moved = {}
    for ratio in (1.0, 4.0):
        config = build(tiny_config, optim={"name": name, "loraplus_lr_ratio": ratio, "weight_decay": 0.1})
        layers = attach(base.model, base.linear_names, config.lora, 0)
        adapter = FlatAdapter(layers, base.dtype)
        adapter.parameter.grad.copy_(torch.randn(adapter.parameter.shape, generator=torch.Generator().manual_seed(0)))
        before, optimizer = adapter.parameter.detach().clone(), make_optimizer(adapter.parameter, config.optim, adapter.num_a)
        set_learning_rate(optimizer, 1e-3)
        optimizer.step()
        change = adapter.parameter.detach() - before
        moved[ratio] = change[: adapter.num_a], change[adapter.num_a :]
        detach(base.model, layers)
    (a, b), (plus_a, plus_b) = moved.values()
    torch.testing.assert_close(plus_a, a, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(plus_b, 4.0 * b, rtol=1e-4, atol=1e-7)
    assert b.abs().min() > 0


def test_lion_takes_the_published_step():
    """Algorithm 2 of arXiv:2302.06675, ten steps."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(5000, generator=generator))
    optimizer = make_optimizer(weight, optim_of(name="lion", learning_rate=1e-2, beta2=0.99, weight_decay=0.1))
    theta, momentum = weight.detach().clone(), torch.zeros(5000)
    for _ in range(10):
        gradient = torch.randn(5000, generator=generator)
        weight.grad = gradient.clone()
        optimizer.step()
        update = (0.9 * momentum + 0.1 * gradient).sign()
        momentum = 0.99 * momentum + 0.01 * gradient
        theta = theta - 1e-2 * (update + 0.1 * theta)
    assert ((weight.detach() - theta).abs() < 1e-6).float().mean() > 0.999  # a sum near 0 may round to either sign


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_muon_takes_the_steps_of_torch_s_on_matrices_and_of_adamw_on_the_rest(tiny_config, ratio):
    optim = {"name": "muon", "loraplus_lr_ratio": ratio, "weight_decay": 0.1, "beta1": 0.95}
    config = build(tiny_config, optim=optim).optim
    shapes = [torch.Size(shape) for shape in ((4, 24), (4, 24), (4, 9), (16, 4), (16, 4), (3, 4))]
    generator, num_a = torch.Generator().manual_seed(0), 4 * 24 * 2 + 4 * 9
    first = [torch.randn(shape, generator=generator) for shape in shapes] + [torch.rand(19, generator=generator) + 1]
    parameter = torch.nn.Parameter(torch.cat([one.flatten() for one in first]))
    ours = make_optimizer(parameter, config, num_a, shapes)
    theirs = [torch.nn.Parameter(one.clone()) for one in first]
    same = {"weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    a, b = (torch.optim.Muon(part, **same) for part in (theirs[:3], theirs[3:6]))
    rest = torch.optim.AdamW(theirs[6:], weight_decay=0.1, betas=(0.95, config.beta2), eps=config.eps)
    for step in range(6):
        gradients = [torch.randn(one.shape, generator=generator) * 10.0 ** (step - 3) for one in first]
        parameter.grad = torch.cat([one.flatten() for one in gradients])
        for one, gradient in zip(theirs, gradients, strict=True):
            one.grad = gradient
        rate = 1e-2 / (1 + step)
        set_learning_rate(ours, rate)
        set_learning_rate(a, rate)
        for optimizer in (b, rest):
            set_learning_rate(optimizer, rate * ratio)
        for optimizer in (ours, a, b, rest):
            optimizer.step()
    expected = torch.cat([one.detach().flatten() for one in theirs])
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=3e-4)  # bfloat16 inside, in another order
    assert (expected - torch.cat([one.flatten() for one in first])).abs().max() > 0.01


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_a_trial_with_its_states_on_the_host_is_the_same_and_goes_on_from_the_other_s_checkpoint(
    tiny_config, tmp_path, base, monkeypatch, name
):
    monkeypatch.setattr(host_states, "STATE_PIECE", 1024)
    folders = {hosted: tmp_path / str(hosted) for hosted in (False, True)}
    configs = {hosted: build(tiny_config, lora={"rank": 64}, optim={"name": name}, train={"offload_optimizer": hosted})
               for hosted in folders}  # fmt: skip
    whole = {hosted: run(configs[hosted], folder, base) for hosted, folder in folders.items()}
    assert configs[True].fingerprint() == configs[False].fingerprint() and same_numbers(whole[True], whole[False])
    (folder := tmp_path / "both").mkdir()
    reports, turn = [], itertools.cycle([True, False])
    while len(reports) < len(whole[True]):
        calls = iter([False] * 6)
        with contextlib.suppress(Interrupted):
            reports += train(configs[next(turn)], folder, base=base, interrupted=lambda c=calls: next(c, True))
    assert same_numbers(reports, whole[True])
    for name in ("adapter/adapter_model.safetensors", "checkpoint/adapter.safetensors"):
        assert len({(one / name).read_bytes() for one in (folder, *folders.values())}) == 1


def test_states_of_32_bits_cannot_be_on_the_host():
    with pytest.raises(InputError, match=r"offload_optimizer = True: must be false or auto with optim.name = muon: only 8-bit"):
        parse(TrainConfig, {**GOOD, "optim": {"name": "muon"}, "train": {"max_tokens": 100, "offload_optimizer": True}})


@pytest.mark.parametrize(
    "optim",
    [{"name": "muon"}, {"name": "lion"}, {"name": "lion_8bit"}, {"loraplus_lr_ratio": 8.0},
     {"name": "adamw_8bit", "loraplus_lr_ratio": 8.0}],
)
def test_a_stopped_trial_goes_on_with_the_same_numbers(tiny_config, tmp_path, base, optim):
    config = build(tiny_config, optim={**optim, "lr_schedule": "wsd", "decay_ratio": 0.5})
    whole, reports, num_pieces = run(config, tmp_path / "whole", base), [], 0
    assert whole[-1].eval_loss < whole[0].eval_loss
    (tmp_path / "pieces").mkdir()
    while len(reports) < len(whole):
        num_pieces += 1
        calls = iter([False] * 6)
        with contextlib.suppress(Interrupted):
            for report in train(config, tmp_path / "pieces", base=base, interrupted=lambda c=calls: next(c, True)):
                reports.append(report)
        assert num_pieces < 50
    assert num_pieces > 1
    assert same_numbers(reports, whole)
    for name in ("adapter/adapter_model.safetensors", "checkpoint/adapter.safetensors"):
        assert (tmp_path / "pieces" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(CheckpointError, match="belongs to config"):
        run(build(tiny_config, optim={"name": "adamw"}), tmp_path / "whole", base)
