"""A whole measurement runs on the CPU with shallow models, and the left-over factor is what was left over."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.bench.shapes import random_config
from engine.errors import InputError
from engine.planning.cards import CARDS
from engine.planning.measured_card import MeasuredCard
from engine.planning.rates import Curve
from engine.planning.sheet_rates import sheet_rates
from engine.rates import fitting, kernel_rates, link_rates, measuring, whole_steps
from engine.rates.widths import Widths
from engine.shape.model_shape import ModelShape
from engine.shape.policies import Policy

CPU = torch.device("cpu")
TINY = Widths("tiny", "tiny", 64, 128, 4, 2, 16, 512, 64)
SHAPES = {TINY: ModelShape.of(random_config("tiny", whole_steps.NUM_LAYERS).to_dict(), "tiny")}
RATES = replace(sheet_rates(CARDS["h100"]), gaps=Curve.flat(1.0))


def test_the_factor_makes_the_measured_steps_right_on_average():
    steps = whole_steps.whole_steps(replace(TINY, tokens=5000))
    shapes = {step.widths: SHAPES[TINY] for step in steps}
    first, second = steps
    seconds = {step: 1e-3 * fitting.predicted_ms(RATES, step, shapes[step.widths]) for step in steps}
    measured = {first: 1.2 * seconds[first], second: 1.4 * seconds[second]}
    fitted = fitting.with_gaps(RATES, measured, shapes)
    assert fitted.gaps.points == ((64.0, pytest.approx(1.3)),)
    errors = [one["predicted_ms"] / one["measured_ms"] for one in fitting.step_records(fitted, measured, shapes).values()]
    assert errors == pytest.approx([1.3 / 1.2, 1.3 / 1.4])


def test_a_shallow_model_has_its_layers_and_adapter_and_its_step_leaves_nothing_behind():
    with whole_steps.shallow_base("tiny", 3, CPU, torch.float32) as (base, adapter):
        assert len(base.model.model.layers) == 3
        calls = []

        def timer(call) -> float:
            call()
            calls.append(adapter.parameter.grad.abs().sum().item())
            return 0.5

        assert whole_steps.step_seconds(timer, base, adapter, Policy.RECOMPUTE, [30, 20]) == 0.5
        assert calls[0] > 0.0 and adapter.parameter.grad.abs().sum().item() == 0.0


def test_the_hosts_time_is_that_of_the_layers_between_two_depths(monkeypatch):
    depths = []
    real = whole_steps.random_base
    monkeypatch.setattr(whole_steps, "random_base", lambda *given: depths.append(given[-1]) or real(*given))

    def timer(call) -> float:
        call()
        return 0.010 + 0.003 * depths[-1]

    assert whole_steps.host_ms(timer, "tiny", CPU, torch.float32, True) == pytest.approx(3.0)
    assert depths == [2, 6]


@pytest.fixture
def small(monkeypatch):
    """Make what is measured small enough for a CPU."""
    monkeypatch.setattr(kernel_rates, "LENGTHS", (50, 100))
    monkeypatch.setattr(link_rates.launch_us, "__defaults__", (10,))
    monkeypatch.setattr(link_rates.link_rates, "__defaults__", (1000,))
    monkeypatch.setattr(kernel_rates.copy_gb_s, "__defaults__", (1000,))
    monkeypatch.setattr(kernel_rates, "quantize_nf4", lambda weight, double_quantization: weight)
    monkeypatch.setattr(kernel_rates.ops, "nf4_state", lambda weight: weight)
    monkeypatch.setattr(kernel_rates.ops, "dequantize_nf4", lambda state, dtype, out: out.copy_(state))
    for unpack in ("weight_scales", "unpack_rows", "unpack_columns"):
        monkeypatch.setattr(kernel_rates.int8_ops, unpack, lambda *_: None)
    for module in (whole_steps, measuring, fitting):
        monkeypatch.setattr(module, "SAMPLE", 20)


def test_a_measurement_goes_through_all_parts_and_is_a_file(small, tmp_path):
    def timer(call) -> float:
        call()
        return 1e-3

    said = []
    bench = measuring.Bench(CPU, torch.float32, timer, timer, timer, kernel_rates.drawing(CPU, torch.float32))
    found = measuring.measure_card(bench, "NVIDIA Test", 24.0, lambda *step: said.append(step), [TINY])
    assert [done for done, _, _ in said] == list(range(8)) and {total for _, total, _ in said} == {7}
    assert found.rates.host_ms > 0 and found.stack.card == "NVIDIA Test"
    assert set(found.steps) == {"tiny keep 3x20", "tiny recompute 3x20"}
    assert {step["measured_ms"] for step in found.steps.values()} == {1.0}
    errors = [step["predicted_ms"] - step["measured_ms"] for step in found.steps.values()]
    assert min(errors) < 0 < max(errors)
    found.write(tmp_path / "card.json")
    assert MeasuredCard.read(tmp_path / "card.json") == found and found.tiles == {}
    tuned = replace(found, tiles={"long": {"t": 128, "n": 256, "k": 64, "warps": 8, "stages": 3}})
    tuned.write(tmp_path / "tuned.json")
    assert MeasuredCard.read(tmp_path / "tuned.json") == tuned
    for size in (0, 512, 1.5):
        replace(tuned, tiles={"long": {**tuned.tiles["long"], "t": size}}).write(tmp_path / "odd.json")
        with pytest.raises(InputError, match="tiles must have k, n, stages, t, warps"):
            MeasuredCard.read(tmp_path / "odd.json")


@pytest.mark.gpu
def test_a_real_card_predicts_its_own_steps():
    device, name, memory_gib = measuring.pick_card()
    found = measuring.measure_card(measuring.Bench.of(device), name, memory_gib, lambda *step: None)
    errors = {name: step["predicted_ms"] / step["measured_ms"] - 1 for name, step in found.steps.items()}
    assert len(errors) == 6 and max(map(abs, errors.values())) < 0.15, errors
    assert found.seconds < 90 and all(0.7 < factor < 3.0 for _, factor in found.rates.gaps.points), found.rates.gaps
