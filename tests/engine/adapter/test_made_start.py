"""PiSSA and LoftQ: the starts of PEFT, on a base that stays as it is."""

from __future__ import annotations

import pytest
import torch

from engine.adapter import made_start
from engine.adapter.flat import FlatAdapter
from engine.adapter.lora import detach
from engine.adapter.start import attach_started
from engine.data.packing import collate
from engine.data.views import load_data
from engine.errors import InputError
from engine.export.forms import export
from engine.model.load import load_base, nf4_load_config
from engine.prepare import prepare
from engine.quant.bnb import keep_as_stored
from engine.quant.low_rank import principal_factors
from engine.training.optim import make_optimizer
from tests.support.trials import CPU, build, mean_loss, run, run_stopped, same_numbers

TARGETS = ["q_proj", "v_proj", "down_proj"]
STEPS = 8


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_SWEEP_CACHE", str(tmp_path / "cache"))


def starting(tiny_config, start, **sections):
    lora = {"rank": 4, "target_modules": TARGETS, "start": start, **sections.pop("lora", {})}
    return build(tiny_config, lora=lora, **sections)


def peft_model(config, adapter=None, **options):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    more = {"quantization_config": nf4_load_config(True, torch.float32)} if config.model.quantization == "nf4" else {}
    model = AutoModelForCausalLM.from_pretrained(config.model.path, device_map={"": "cpu"}, dtype=torch.float32, **more)
    keep_as_stored(model)  # else the library repacks NF4 weights in evaluation on some CPUs
    if adapter is not None:
        return PeftModel.from_pretrained(model, str(adapter)).eval()
    lora = config.lora
    return get_peft_model(model, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=TARGETS, **options))


def loss_of(model, row):
    logits = model(input_ids=row.input_ids_T[None], use_cache=False).logits[0].float()
    return torch.nn.functional.cross_entropy(logits, row.labels_T, reduction="sum", ignore_index=-100) / row.num_targets


def curve(config, base, layers):
    """Return the losses of some steps without weight decay, and leave the adapter trained."""
    adapter, (view, _) = FlatAdapter(layers, base.dtype), load_data(config.data, base.tokenizer)
    optimizer, losses = make_optimizer(adapter.parameter, config.optim, adapter.num_a), []
    base.model.train()
    for step in range(STEPS):
        row = collate([view[step % len(view)]])
        loss = base.loss(row) / row.num_targets
        loss.backward()
        adapter.freeze(decays=False)
        optimizer.step()
        adapter.refresh()
        adapter.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses), view


def their_curve(config, model, view):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=config.optim.learning_rate, weight_decay=0.0), []
    model.train()
    for step in range(STEPS):
        loss = loss_of(model, collate([view[step % len(view)]]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
def test_factors_are_the_best_of_their_rank_and_iterations_find_them_too(shape, monkeypatch):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    exact_a, exact_b = principal_factors(weight, 5)
    values = torch.linalg.svdvals(weight)
    assert torch.linalg.norm(weight - exact_b @ exact_a) == pytest.approx(values[5:].square().sum().sqrt().item(), rel=1e-5)
    monkeypatch.setattr("engine.quant.low_rank.EXACT_UP_TO", 8)
    found_a, found_b = principal_factors(weight, 5)
    torch.testing.assert_close(found_b @ found_a, exact_b @ exact_a, rtol=0, atol=0.02)
    assert (exact_b.gather(0, exact_b.abs().argmax(0, keepdim=True)) > 0).all()


def test_pissa_has_the_start_and_the_losses_of_peft_on_a_base_that_stays(tiny_config):
    optim, plain_base = {"name": "adamw", "learning_rate": 3e-3}, {"quantization": "none"}
    config = starting(tiny_config, "pissa", lora={"lora_alpha": 6.0}, model=plain_base, optim=optim)
    base = load_base(config.model, CPU)
    layers = attach_started(base.model, base.linear_names, config)
    model = peft_model(config, init_lora_weights="pissa")
    for name, layer in layers.items():
        theirs = model.base_model.model.get_submodule(name)
        product = (theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight).detach()
        torch.testing.assert_close((layer.lora_b[:, :4] @ layer.lora_a[:4]).detach(), product, rtol=1e-4, atol=1e-5)
        frozen = (layer.lora_b @ layer.lora_a).detach()
        torch.testing.assert_close(frozen, torch.zeros_like(frozen), rtol=0, atol=1e-6)
    before = {name: layer.lora_a.detach()[4:].clone() for name, layer in layers.items()}
    ours, view = curve(config, base, layers)
    torch.testing.assert_close(ours, their_curve(config, model, view), rtol=5e-4, atol=5e-4)
    assert all(torch.equal(layer.lora_a.detach()[4:], before[name]) for name, layer in layers.items())
    detach(base.model, layers)
    plain, _ = curve(config, base, other := attach_started(base.model, base.linear_names, starting(tiny_config, "default")))
    detach(base.model, other)
    assert not torch.allclose(ours, plain, atol=5e-3)


def test_loftq_has_the_start_and_the_losses_of_peft_on_nf4(tiny_config, monkeypatch):
    from bitsandbytes.functional import dequantize_4bit
    from peft import replace_lora_weights_loftq
    from peft.utils import loftq_utils

    def on_cpu(packed, weight, num_bits, reduced_rank):  # the library's own asks for a card
        residual = weight.float() - dequantize_4bit(packed.data, packed.quant_state)
        found = loftq_utils._low_rank_decomposition(residual, reduced_rank=reduced_rank)
        return found["R"], found["L"]

    monkeypatch.setattr(loftq_utils, "_loftq_init_new", on_cpu)
    config = starting(tiny_config, "loftq", lora={"lora_alpha": 4.0}, optim={"name": "adamw", "learning_rate": 3e-3})
    base = load_base(config.model, CPU)
    layers = attach_started(base.model, base.linear_names, config)
    model = peft_model(config)
    replace_lora_weights_loftq(model, model_path=config.model.path + "/model.safetensors")
    for name, layer in layers.items():  # with a scaling of 1, which PEFT's start takes for granted
        theirs = model.base_model.model.get_submodule(name)
        product = (theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight).detach()
        torch.testing.assert_close((layer.lora_b @ layer.lora_a).detach(), product, rtol=1e-3, atol=1e-5)
    ours, view = curve(config, base, layers)
    torch.testing.assert_close(ours, their_curve(config, model, view), rtol=5e-4, atol=5e-4)
    detach(base.model, layers)


@pytest.mark.parametrize("start", ["pissa", "loftq"])
def test_trials_share_one_start_resume_exactly_and_peft_reads_the_export(tiny_config, tmp_path, base, start, monkeypatch):
    config = starting(tiny_config, start, optim={"weight_decay": 0.1})
    assert prepare([config]).num_trainable == prepare([starting(tiny_config, "default")]).num_trainable
    whole = run(config, tmp_path / "whole", base)

    def refuse(*_):
        raise AssertionError("the start was made again")

    monkeypatch.setattr(made_start, "principal_factors", refuse)
    parts = run_stopped(config, tmp_path / "parts", base)
    assert same_numbers(whole, parts) and whole[-1].eval_loss < whole[0].eval_loss
    assert whole[0].num_trainable == prepare([config]).num_trainable[0]
    best = min(report.eval_loss for report in whole)
    _, view = load_data(config.data, base.tokenizer)
    model = peft_model(config, tmp_path / "whole/adapter")
    assert mean_loss(view, lambda row: loss_of(model, row).item()) == pytest.approx(best, abs=2e-4)
    with pytest.raises(AssertionError, match="made again"):  # twin: another rank is another start
        run(starting(tiny_config, start, lora={"rank": 2}), tmp_path / "other", base)


def test_before_its_first_step_pissa_adds_nothing_and_loftq_brings_the_base_nearer_to_its_original(tiny_config, base):
    view, _ = load_data(starting(tiny_config, "pissa").data, base.tokenizer)
    rows = [collate([view[i]]) for i in range(4)]
    exact = load_base(base.config.model_copy(update={"quantization": "none"}), CPU)

    @torch.no_grad()
    def states(model):
        return torch.cat([model.hidden_states(row) for row in rows])

    truth, plain = states(exact), states(base)
    for start, rank in (("pissa", 4), ("loftq", 28)):
        config = starting(tiny_config, start, lora={"rank": rank, "target_modules": "all-linear"})
        layers = attach_started(base.model, base.linear_names, config)
        found = states(base)
        detach(base.model, layers)
        if start == "pissa":
            torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
        else:
            assert (found - truth).norm() < 0.7 * (plain - truth).norm()


def test_loftq_merges_what_was_learnt_without_its_start(tiny_config, tmp_path, base):
    """Merged into the original weights, a start that makes up for NF4 would be an error of its own."""
    from transformers import AutoModelForCausalLM

    config = starting(tiny_config, "loftq", lora={"rank_pattern": {"v_proj": 2}}, optim={"learning_rate": 1e-12})
    run(config, tmp_path / "trial", base)
    export(tmp_path / "trial/adapter", "merged", tmp_path / "merged", config=config, measure=False)
    ours, original = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (tmp_path / "merged", config.model.path)
    )
    for (name, one), two in zip(ours.named_parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=2**-7, atol=2e-4, msg=name)
    export(tmp_path / "trial/adapter", "peft", tmp_path / "peft", config=config, measure=False)
    assert not (tmp_path / "peft" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("start", "sections", "why"),
    [
        ("loftq", {"model": {"quantization": "none"}}, "model.quantization = none loses nothing"),
        ("pissa", {"lora": {"start_from": "x"}}, "must be default with lora.start_from"),
        ("pissa", {"lora": {"rank": 4096}}, "needs a rank of at most"),
        ("svd", {}, "lora.start"),
    ],
)
def test_a_start_that_cannot_be_right_is_one_line(tiny_config, start, sections, why):
    with pytest.raises(InputError, match=why) as caught:
        prepare([starting(tiny_config, start, **sections)])
    assert caught.value.field == "lora.start" and "\n" not in str(caught.value)


def test_starts_are_part_of_the_trial_s_identity(tiny_config):
    prints = {starting(tiny_config, start).fingerprint() for start in ("default", "pissa", "loftq")}
    assert len(prints) == 3


def test_a_start_in_another_user_s_cache_is_read(tiny_config, base, monkeypatch):
    config = starting(tiny_config, "pissa")
    made = attach_started(base.model, base.linear_names, config)
    detach(base.model, made)

    def denied(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(made_start.os, "utime", denied)
    again = attach_started(base.model, base.linear_names, config)
    detach(base.model, again)
    assert all(torch.equal(made[name].lora_a, again[name].lora_a) for name in made)
