"""Each rate is work over seconds, with work counted by hand here and seconds from a fake timer."""

from __future__ import annotations

import pytest
import torch

from engine.rates import kernel_rates, link_rates
from engine.rates.timing import WARM_UP, HostTimer, LoadTimer
from engine.rates.widths import Widths

TINY = Widths("tiny", "tiny", 64, 128, 4, 2, 16, 512, 32)
CPU = torch.device("cpu")
draw = kernel_rates.drawing(CPU, torch.float32)
T, D, F, V = 32, 64, 128, 512
WEIGHTS = 128 * 64 + 64 * 64 + 256 * 64 + 64 * 128  # qkv, o, gate and up, down
BY_HAND = {  # operations, or bytes of 16-bit values
    "matmul_tflops": 2 * 2 * T * WEIGHTS,
    "head_tflops": 2 * 2 * T * V * D,
    "thin_tflops": 4 * 2 * T * D * 256,
    "loss_gb_s": 4 * 2 * T * V,
    "norm_gb_s": 10 * 2 * T * D,
    "adapter_gb_s": 8 * 2 * T * D,
    "activation_gb_s": 9 * 2 * T * F,
    "int8_matmul_tops": 2 * 2 * T * WEIGHTS,
    "int8_rows_gb_s": 3 * T * (D + 128 + D + D + D + 256 + F + D),  # of each product: inputs and gradients
}
CALLS = {"matmul_tflops": 8, "head_tflops": 2, "thin_tflops": 4, "loss_gb_s": 1, "norm_gb_s": 3, "adapter_gb_s": 6,
         "activation_gb_s": 2, "int8_matmul_tops": 8, "int8_rows_gb_s": 8}  # fmt: skip


def timer(call) -> float:
    """Run the call once, which took 2 ms."""
    call()
    return 2e-3


@pytest.mark.parametrize("name", BY_HAND)
def test_a_rate_is_its_work_over_its_seconds(name):
    unit = 1e12 if name.endswith(("tflops", "tops")) else 1e9
    assert getattr(kernel_rates, name)(timer, draw, TINY) == pytest.approx(BY_HAND[name] / (CALLS[name] * 2e-3) / unit)


def test_nf4_counts_packed_bytes_and_16_bit_values(monkeypatch):
    seen = []
    monkeypatch.setattr(kernel_rates.ops, "nf4_state", lambda weight: weight)
    monkeypatch.setattr(kernel_rates.ops, "dequantize_nf4", lambda state, dtype, out: seen.append(tuple(out.shape)))
    assert kernel_rates.nf4_gb_s(timer, draw, TINY) == pytest.approx(2.516 * WEIGHTS / 8e-3 / 1e9)
    assert seen == [(128, 64), (64, 64), (256, 64), (64, 128)]


@pytest.mark.parametrize(("name", "unpack"), [("int8_forward_gb_s", "unpack_rows"), ("int8_backward_gb_s", "unpack_columns")])
def test_int8_codes_of_weights_count_packed_bytes_and_codes(name, unpack, monkeypatch):
    seen = []
    monkeypatch.setattr(kernel_rates.ops, "nf4_state", lambda weight: weight)
    monkeypatch.setattr(kernel_rates.int8_ops, "weight_scales", lambda states, is_rotated: is_rotated)
    monkeypatch.setattr(kernel_rates.int8_ops, unpack, lambda states, scales: seen.append((len(states), scales)))
    assert getattr(kernel_rates, name)(timer, draw, TINY) == pytest.approx(1.516 * WEIGHTS / 8e-3 / 1e9)
    assert seen == [(1, True)] * 4


def test_attention_is_timed_forward_and_backward_on_samples_of_the_length():
    seen = []
    assert kernel_rates.attention_seconds(lambda call: seen.append(call()) or 1.0, draw, TINY, 4000) == (1.0, 1.0)
    assert seen[0] is None and [tuple(grad.shape) for grad in seen[1]] == [(8000, 4, 16), (8000, 2, 16), (8000, 2, 16)]


@pytest.mark.parametrize("half_length", [200.0, 1000.0, 3000.0])
def test_attentions_rates_are_found_from_two_lengths(half_length):
    def seconds(length: int) -> tuple[float, float]:
        rate = 100e12 * length / (length + half_length)
        flops = kernel_rates.attention_flops(TINY, length)
        return flops / rate, 2.5 * flops / (0.8 * rate)

    found = kernel_rates.attention_rates({n: seconds(n) for n in (8000, 1000)}, TINY)
    assert found == pytest.approx((100.0, half_length, 0.8))


def test_short_samples_as_fast_as_long_ones_give_no_impossible_rate():
    flops = {n: kernel_rates.attention_flops(TINY, n) for n in (1000, 8000)}
    flat = {n: (f / 50e12, f / 20e12) for n, f in flops.items()}
    endless, half_length, _ = kernel_rates.attention_rates(flat, TINY)
    assert endless == pytest.approx(50.0, rel=1e-3) and 1.0 <= half_length < 2.0


def test_links_and_launches_are_bytes_and_calls_over_seconds():
    seconds = iter((1e-3, 2e-3, 4e-3))
    rates = link_rates.link_rates(lambda call: (call(), next(seconds))[1], CPU, num_bytes=2_000_000)
    assert (rates.to_card, rates.to_host, rates.both, rates.one_way) == pytest.approx((2.0, 1.0, 0.5, 1.0))
    calls = []
    assert link_rates.launch_us(timer, lambda: calls.append(1), launches=500) == pytest.approx(4.0)
    assert len(calls) == 500
    assert kernel_rates.copy_gb_s(timer, draw, 1000) == pytest.approx(2 * 4000 / 2e-3 / 1e9)


def test_steps_are_timed_after_as_long_under_load_as_asked_for(monkeypatch):
    counts = []
    monkeypatch.setattr(LoadTimer, "_mean", lambda self, call, count: counts.append(count) or 0.01)
    assert LoadTimer(CPU, load_s=0.7, measured_s=0.3)(lambda: None) == 0.01
    assert counts == [2, 70, 30]


def test_the_hosts_timer_takes_the_median_and_waits_for_the_device():
    now, waits = [0.0], []
    steps = iter([9.0] * WARM_UP + [1.0, 5.0, 2.0])

    def call() -> None:
        now[0] += next(steps)

    assert HostTimer(lambda: waits.append(now[0]), lambda: now[0], calls=3)(call) == 2.0
    assert len(waits) == 6
