"""Losses of pairs and their gradients equal the papers' formulas on the library's own model."""

import pytest
import torch

from engine.adapter.flat import FlatAdapter
from engine.adapter.lora import attach
from engine.config.parsing import parse
from engine.config.preference_section import PreferenceConfig
from engine.data.packing import collate
from engine.data.views import load_data
from engine.model.load import load_base
from engine.preference.pair_losses import pair_losses, row_loss
from engine.training.cuda_graphs import RowLoss, make_graphs
from tests.support.preferences import dpo_of_paper, orpo_of_paper, pair_rows, preference_values, sum_and_count, write_rows
from tests.support.trials import CPU, build

SECTIONS = [
    {"loss": "dpo", "beta": 0.3},
    {"loss": "dpo", "beta": 2.0, "label_smoothing": 0.2},
    {"loss": "orpo", "beta": 0.5},
]


def trained(config, layers_option):
    """Return the base without quantisation, its model in evaluation mode, and an adapter that is not zero."""
    model = config.model.model_copy(update={"layers": layers_option, "quantization": "none", "dtype": "float32"})
    base = load_base(model, CPU)
    layers = attach(base.model, base.linear_names, config.lora, 0)
    adapter = FlatAdapter(layers, base.dtype)
    with torch.no_grad():
        adapter.parameter += 0.02 * torch.randn(adapter.parameter.shape, generator=torch.Generator().manual_seed(1))
    adapter.refresh()
    base.model.train()
    return base, adapter


@pytest.fixture(params=SECTIONS, ids=lambda section: f"{section['loss']}-{section['beta']}")
def case(request, tiny_config, tmp_path):
    """Return config, six samples in pairs, what a reference model says of them, and what the paper's loss gives."""
    values = preference_values(tiny_config, write_rows(tmp_path / "pairs.jsonl", pair_rows(12)), **request.param)
    config = build(values)
    plain, adapter = trained(config, "original")
    plain.model.set_attn_implementation("sdpa")  # the library's own, which takes one sample without packing
    view, _ = load_data(config.data, plain.tokenizer)
    samples = [view[i] for i in range(6)]
    reference = torch.linspace(-40.0, -35.0, 6, dtype=torch.float64)
    total = torch.zeros(())
    for i in range(0, 6, 2):
        chosen, rejected = (sum_and_count(plain.model, sample) for sample in samples[i : i + 2])
        if config.preference.loss == "orpo":
            total = total + orpo_of_paper(config.preference.beta, chosen, rejected)
        else:
            policy = chosen[0], rejected[0]
            total = total + dpo_of_paper(
                config.preference.beta, policy, reference[i : i + 2].float(), config.preference.label_smoothing
            )
    total.backward()
    return config, samples, reference, total.detach(), adapter.parameter.grad.clone()


def test_loss_and_gradient_of_a_packed_row_are_the_papers(case):
    config, samples, reference, truth, gradient = case
    base, adapter = trained(config, "strict")
    row = collate(samples, reference.numpy() if config.preference.needs_reference else None)
    loss = row_loss(config.preference, base.trained_target_losses(row), row)
    loss.backward()
    torch.testing.assert_close(loss.detach(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    # chosen and rejected the other way round are another loss
    swapped = collate([samples[i ^ 1] for i in range(6)], reference.numpy() if config.preference.needs_reference else None)
    other = row_loss(config.preference, base.trained_target_losses(swapped), swapped).detach()
    assert not torch.allclose(other, truth, rtol=1e-4)


def test_a_padded_row_has_the_same_loss_and_gradient(case):
    config, samples, reference, truth, gradient = case
    base, adapter = trained(config, "strict")

    def of_row(row):
        return row_loss(config.preference, base.trained_target_losses(row), row)

    has_reference = config.preference.needs_reference
    graphs = make_graphs(base, adapter.memory, 0, 1024, 128, loss=RowLoss(of_row, has_reference))
    found = graphs.backward(collate(samples, reference.numpy() if has_reference else None), 3)
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.parameter.grad, gradient / 3, rtol=1e-4, atol=1e-6)


def test_certain_answers_have_finite_losses_and_gradients():
    section = parse(PreferenceConfig, {"loss": "orpo"})
    logp = torch.tensor([0.0, -1e-12, -1e4, -3.0], dtype=torch.float64, requires_grad=True)
    losses, _ = pair_losses(section, logp, torch.tensor([4, 4, 4, 0]), None)
    losses.sum().backward()
    assert losses.isfinite().all() and logp.grad.isfinite().all()


def test_a_model_that_is_its_own_reference_has_the_loss_of_a_coin():
    logp = torch.tensor([-7.0, -9.0], dtype=torch.float64)
    loss, margin = pair_losses(parse(PreferenceConfig, {}), logp, torch.tensor([3, 3]), logp)
    assert loss.item() == pytest.approx(0.6931471805599453) and margin.item() == 0.0
