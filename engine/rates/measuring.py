"""Measure a card and its host: rates one by one, then whole steps, in about a minute."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial

import torch

from engine.bench.shapes import random_config
from engine.kernels import ops
from engine.kernels.eight_bit.int8_tiles import Tile
from engine.model.device import free, pick_dtype
from engine.planning.measured_card import TILE_SIZES, CardStack, MeasuredCard
from engine.rates import kernel_rates, link_rates
from engine.rates.fitting import rates_of_numbers, step_records, with_gaps
from engine.rates.kernel_rates import Draw
from engine.rates.tile_choice import tune_tiles
from engine.rates.timing import DeviceTimer, HostTimer, LoadTimer, Timer
from engine.rates.whole_steps import NUM_LAYERS, SAMPLE, WholeStep, host_ms, shallow_base, step_seconds, whole_steps
from engine.rates.widths import ALL_WIDTHS, Widths
from engine.shape.model_shape import ModelShape
from engine.system.provenance import provenance
from engine.units import GIB

Say = Callable[[int, int, str], None]  # parts done, parts in all, the next one's name
BY_WIDTHS = (
    "matmul_tflops", "head_tflops", "loss_gb_s", "norm_gb_s", "adapter_gb_s", "thin_tflops", "activation_gb_s", "nf4_gb_s",
    "int8_matmul_tops", "int8_forward_gb_s", "int8_backward_gb_s", "int8_rows_gb_s",
)  # fmt: skip


@dataclass
class Bench:
    """What measures: the device, its timers, and what draws tensors.

    on_device: of single kernels. in_a_row: of whole steps. raw: every number so far.
    """

    device: torch.device
    dtype: torch.dtype
    on_device: Timer
    in_a_row: Timer
    on_host: Timer
    draw: Draw
    raw: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, device: torch.device) -> Bench:
        """Return the bench of a CUDA device."""
        dtype, host = pick_dtype("auto", device), HostTimer(torch.cuda.synchronize)
        return cls(device, dtype, DeviceTimer(device), LoadTimer(device), host, kernel_rates.drawing(device, dtype))


def measure_card(bench: Bench, card: str, memory_gib: float, say: Say, all_widths: Sequence[Widths] = ALL_WIDTHS) -> MeasuredCard:
    """Return the measurement of the bench's device, named `card`.

    say: called before each part, and at the end. Raises torch.OutOfMemoryError if less than about
    6 GiB are free.
    """
    began, found = time.perf_counter(), _Found()
    parts = list(_parts(bench, all_widths, found))
    for done, (name, measure) in enumerate(parts):
        say(done, len(parts), name)
        measure()
        free(bench.device)
    say(len(parts), len(parts), "")
    shapes = {w: ModelShape.of(random_config(w.model, NUM_LAYERS).to_dict(), w.model) for w in all_widths}
    plain = rates_of_numbers(
        found.by_widths, found.attention, link_gb_s=found.link_gb_s, host_ms=found.host_ms[True],
        unfused_host_ms=found.host_ms[False],
    )  # fmt: skip
    rates = with_gaps(plain, found.steps, shapes)
    records, seconds = step_records(rates, found.steps, shapes), time.perf_counter() - began
    commit = provenance().get("git.commit", "")
    facts = (CardStack.here(card), memory_gib, commit, date.today().isoformat(), seconds, rates, bench.raw, records)
    return MeasuredCard(*facts, {use: {name: getattr(tile, name) for name in TILE_SIZES} for use, tile in found.tiles.items()})


@dataclass
class _Found:
    by_widths: dict[Widths, dict[str, float]] = field(default_factory=dict)
    attention: dict[Widths, tuple[float, float, float]] = field(default_factory=dict)
    host_ms: dict[bool, float] = field(default_factory=dict)
    steps: dict[WholeStep, float] = field(default_factory=dict)
    link_gb_s: float = 0.0
    tiles: dict[str, Tile] = field(default_factory=dict)


def _parts(bench: Bench, all_widths: Sequence[Widths], found: _Found) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield name and function of each part; a function puts what it measures into `found`."""

    def link() -> None:
        found.link_gb_s = _link(bench)

    def tiles() -> None:
        found.tiles = tune_tiles(bench.on_device, bench.draw, all_widths)

    def kernels(widths: Widths) -> None:
        found.by_widths[widths] = _kernels(bench, widths)

    def attention(widths: Widths) -> None:
        found.attention[widths] = _attention(bench, widths)

    def host(fused: bool) -> None:
        model = min(all_widths, key=lambda widths: widths.hidden).model
        found.host_ms[fused] = host_ms(bench.on_host, model, bench.device, bench.dtype, fused)
        bench.raw[f"host ms a layer, {'fused' if fused else 'unfused'}"] = found.host_ms[fused]

    def steps(widths: Widths) -> None:
        found.steps |= _steps(bench, widths)

    yield "link and launches", link
    yield "tiles of products in INT8", tiles  # the kernels' rates are those of these tiles
    yield from ((f"kernels at {widths.name} widths", partial(kernels, widths)) for widths in all_widths)
    by_head = {widths.head_dim: widths for widths in all_widths}
    yield from ((f"attention with heads of {dim}", partial(attention, widths)) for dim, widths in by_head.items())
    yield "the host's time for a fused layer", partial(host, True)
    yield "the host's time for an unfused layer", partial(host, False)
    yield from ((f"whole steps at {widths.name} widths", partial(steps, widths)) for widths in all_widths)


def _link(bench: Bench) -> float:
    link = link_rates.link_rates(bench.on_host, bench.device)
    one, row, weight = bench.draw(1), bench.draw(1, 64), bench.draw(64)
    bench.raw |= {
        "copy GB/s": kernel_rates.copy_gb_s(bench.on_device, bench.draw),
        "link to card GB/s": link.to_card, "link to host GB/s": link.to_host, "link both at once GB/s": link.both,
        "launch us": link_rates.launch_us(bench.on_host, lambda: one.add_(1)),
        "launch of Triton us": link_rates.launch_us(bench.on_host, lambda: ops.rms_norm(row, weight, kernel_rates.EPS)),
    }  # fmt: skip
    return link.one_way


def _kernels(bench: Bench, widths: Widths) -> dict[str, float]:
    found = {name: getattr(kernel_rates, name)(bench.on_device, bench.draw, widths) for name in BY_WIDTHS}
    bench.raw |= {f"{name} {widths.name}": value for name, value in found.items()}
    return found


def _attention(bench: Bench, widths: Widths) -> tuple[float, float, float]:
    lengths = kernel_rates.LENGTHS
    seconds = {n: kernel_rates.attention_seconds(bench.on_device, bench.draw, widths, n) for n in lengths}
    for length, (forward, backward) in seconds.items():
        flops = kernel_rates.attention_flops(widths, length)
        bench.raw[f"attention TFLOP/s {widths.name} {length} forward"] = flops / forward / 1e12
        bench.raw[f"attention TFLOP/s {widths.name} {length} backward"] = 2.5 * flops / backward / 1e12
    return kernel_rates.attention_rates(seconds, widths)


def _steps(bench: Bench, widths: Widths) -> dict[WholeStep, float]:
    with shallow_base(widths.model, NUM_LAYERS, bench.device, bench.dtype) as (base, adapter):
        return {
            step: step_seconds(bench.in_a_row, base, adapter, step.policy, [SAMPLE] * step.num_samples)
            for step in whole_steps(widths)
        }


def pick_card() -> tuple[torch.device, str, float]:
    """Return the visible card with the least memory, as `engine inspect` does: device, name, GiB."""
    numbers = range(torch.cuda.device_count())
    memory, name, number = min((torch.cuda.mem_get_info(i)[1], torch.cuda.get_device_name(i), i) for i in numbers)
    return torch.device("cuda", number), name, memory / GIB
