"""Time every kernel at the shapes of Llama-3.1-8B.

Run `python -m engine.kernels.bench` on a CUDA device; it takes less than 25 s.

Each case is checked for parity before it is timed, and a failed check ends the run. Times are
medians, and the L2 cache is flushed before each call. "of copy" is the bandwidth of the bytes an
operation must move, as a share of a large copy's bandwidth on the same card. "plain" is
`engine.kernels.reference` on the same card, and bitsandbytes for NF4. Attention, at the shape of
Gemma-2-2B, is bound by its products: it shows TFLOP/s, of the products that any backward pass needs.

`--tune` times NF4 dequantisation over tile sizes and warps instead.
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import triton
from torch import Tensor

from engine.errors import EngineError
from engine.kernels import ops, reference

T, D, F, H, G, K, V, C, R = 4096, 4096, 14336, 32, 8, 128, 128_256, 1024, 16
DTYPE = torch.bfloat16
EPS = 1e-5
# Largest relative difference (Frobenius norm). Both sides round the same fp32 values, so only a few
# elements differ, by one bf16 step.
PARITY = 5e-4


@dataclass(frozen=True)
class Case:
    """Hold one operation to check and time.

    `ours` and `plain` return the tensors that parity compares; in-place operations return those
    they wrote. `num_bytes` is the least the operation must move, and `exact` asks for equal bits.
    `flops`, if not 0, are the floating-point operations of products that it cannot do without.
    """

    name: str
    num_bytes: int
    ours: Callable[[], object]
    plain: Callable[[], object]
    exact: bool = False
    parity: float = PARITY
    flops: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="time NF4 dequantisation over tiles and warps")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("engine.kernels.bench: needs a CUDA device")
    started = time.perf_counter()
    bandwidth = copy_bandwidth()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}, copy {bandwidth:,.0f} GB/s")
    rows = tune(bandwidth) if options.tune else [measure(case, bandwidth) for make in CASES for case in make()]
    print(f"{time.perf_counter() - started:.1f} s")
    print(
        json.dumps(
            {"device": device, "torch": torch.__version__, "triton": triton.__version__, "copy_gb_s": bandwidth, "ops": rows}
        )
    )


def measure(case: Case, bandwidth: float) -> dict[str, object]:
    """Check parity, time both sides, print one line of the table and return it as data."""
    check(case)
    ours, plain = microseconds(case.ours), microseconds(case.plain)
    rate, tflops = case.num_bytes / ours / 1e3, case.flops / ours / 1e6
    shown = f"{tflops:7,.0f} TFLOP/s" if tflops else f"{rate:7,.0f} GB/s  {rate / bandwidth:5.0%} of copy"
    print(f"{case.name:36} {ours:9,.1f} us  plain {plain:9,.1f} us  x{plain / ours:5.2f}  {shown}")
    row = {"op": case.name, "us": ours, "plain_us": plain, "gb_s": rate, "share_of_copy": rate / bandwidth}
    return {**row, "tflops": tflops} if tflops else row


def check(case: Case) -> None:
    ours, plain = _tensors(case.ours()), _tensors(case.plain())
    for a, b in zip(ours, plain, strict=True):
        deviation = ((a.float() - b.float()).norm() / b.float().norm()).item()
        good = torch.equal(a, b) if case.exact else deviation <= case.parity
        if not good:
            allowed = 0 if case.exact else case.parity
            raise EngineError(f"{case.name}: differs from plain by {deviation:.2e}, allowed is {allowed}")


def microseconds(call: Callable[[], object]) -> float:
    return 1e3 * triton.testing.do_bench(call, warmup=15, rep=60, return_mode="median")


def copy_bandwidth() -> float:
    """Return the GB/s (read plus written) of a 512 MiB copy: an element-wise kernel's limit."""
    source = torch.empty(2**28, dtype=DTYPE, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds(lambda: target.copy_(source)) / 1e3


def _tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=DTYPE)


def _norm_cases() -> list[Case]:
    x, delta, dy, weight = _draw(T, D), _draw(T, D), _draw(T, D), _draw(D)
    _, rstd = reference.rms_norm(x, weight, EPS)

    def case(name: str, op: str, num_tensors: int, *arguments: object) -> Case:
        return _case(f"{name} {T}x{D}", num_tensors * x.nbytes, op, arguments)

    return [
        case("rms_norm", "rms_norm", 2, x, weight, EPS),
        case("rms_norm offset 1", "rms_norm", 2, x, weight, EPS, 1.0),
        case("add_rms_norm", "add_rms_norm", 4, x, delta, weight, EPS),
        case("rms_norm_backward", "rms_norm_backward", 3, dy, x, weight, rstd),
        case("rms_norm_backward + residual", "rms_norm_backward", 4, dy, x, weight, rstd, 0.0, delta),
    ]


def _rope_cases() -> list[Case]:
    fused = _draw(T, (H + 2 * G) * K)
    parts = [part.unflatten(1, (-1, K)) for part in fused.split([H * K, G * K, G * K], dim=1)]
    angle = torch.outer(torch.arange(T), 500_000.0 ** (-torch.arange(0, K, 2) / K)).repeat(1, 2)
    cos, sin = (f(angle).to("cuda", DTYPE) for f in (torch.cos, torch.sin))
    num_bytes = 2 * 2 * T * (H + G) * K + 2 * 2 * T * K // 2
    return [
        _in_place(f"rope_{' inverse' if inverse else ''} {T}x({H}+{G})x{K}", num_bytes, "rope_", parts[:2], (cos, sin, inverse))
        for inverse in (False, True)
    ]


def _glu_cases() -> list[Case]:
    gate, up, dh = _draw(T, F), _draw(T, F), _draw(T, F)
    cases = []
    for activation in ops.ACTIVATIONS:
        cases.append(_case(f"glu {activation} {T}x{F}", 3 * gate.nbytes, "glu", (gate, up, activation)))
        written = [dh.clone(), gate.clone(), up.clone()]
        cases.append(_in_place(f"glu_backward_ {activation} {T}x{F}", 6 * gate.nbytes, "glu_backward_", written, (activation,)))
    return cases


def _glu_low_rank_cases() -> list[Case]:
    """Return cases with low-rank terms, laid out as in a layer.

    gate and up share a buffer, so do their adapters, and down's A is transposed.
    """
    dh, gate_up, low = _draw(T, F), _draw(T, 2 * F), _draw(T, 2 * R)
    gate_add, up_add = (ops.LowRank(part, _draw(F, R) / R) for part in low.split(R, dim=1))
    dh_add = ops.LowRank(_draw(T, R), (_draw(R, F) / R).t())
    gate, up = gate_up.chunk(2, dim=1)
    name = f"silu rank {R} {T}x{F}"
    rest = ("silu", gate_add, up_add)
    return [
        _case(f"glu {name}", 3 * dh.nbytes, "glu", (gate, up, *rest)),
        _in_place(f"glu_backward_ {name}", 6 * dh.nbytes, "glu_backward_", [dh, gate, up], (*rest, dh_add)),
    ]


def _nf4_cases() -> list[Case]:
    return [_nf4_case(rows, columns, nested) for rows, columns in ((F, D), (D, D), (G * K, D)) for nested in (True, False)]


def _loss_cases() -> list[Case]:
    """Return cases on widely spread logits: the softmax then counts next to the -1 at the label.

    While timed, each call takes the previous call's gradients as its logits.
    """
    logits, labels = 4 * _draw(C, V), torch.randint(V, (C,), device="cuda")

    def case(softcap: float | None) -> Case:
        own, other = logits.clone(), logits.clone()
        return Case(
            f"cross_entropy_{' softcap' if softcap else ''} {C}x{V}",
            2 * logits.nbytes,
            lambda: (ops.cross_entropy_(own, labels, softcap=softcap), own),
            lambda: (reference.cross_entropy_(other, labels, softcap=softcap), other),
        )

    return [case(None), case(30.0)]


def _dropout_cases() -> list[Case]:
    x, noise = _draw(T, D), torch.tensor(ops.noise_of(1, 0.1), device="cuda")
    return [_case(f"dropout {T}x{D}", 2 * x.nbytes, "dropout", (x, noise, 3))]


def _gather_cases() -> list[Case]:
    """Return the case of a table in pinned host memory.

    Our kernel reads it over PCIe, which limits its share; plain reads a copy of the table on the
    device.
    """
    table, ids = _draw(32_768, D), torch.randint(32_768, (T,), device="cuda")
    pinned = table.cpu().pin_memory()
    return [
        Case(
            f"gather_rows pinned {T}x{D}",
            2 * T * D * table.element_size(),
            lambda: ops.gather_rows(pinned, ids),
            lambda: reference.gather_rows(table, ids),
            exact=True,
        )
    ]


def _attention_cases() -> list[Case]:
    """Return attention with a softcap over four samples. Weights of keys are rounded to bf16 before they meet the values."""
    heads, groups, features, length, softcap = 8, 4, 256, T // 4, 50.0
    q, dout = _draw(T, heads, features), _draw(T, heads, features)
    k, v = _draw(T, groups, features), _draw(T, groups, features)
    how = (ops.document_spans(torch.arange(0, T + 1, length, device="cuda"), T), features**-0.5, softcap)
    given = (q, k, v, *reference.attention(q, k, v, *how))
    name, num_bytes = f"softcap {T}/{length}x{heads}+{groups}x{features}", 2 * q.nbytes + 2 * k.nbytes
    flops = 2 * T * length * heads * features
    both = "attention", "attention_backward"
    cases = [_case(f"{op} {name}", num_bytes, op, (q, k, v, *how) if op == both[0] else (dout, *given, *how)) for op in both]
    return [replace(case, parity=1e-2, flops=flops * factor) for case, factor in zip(cases, (1.0, 2.5))]


def _ragged_attention_cases() -> list[Case]:
    """Return attention over a ragged row, next to torch's flash attention: who is faster decides the route.

    `tiles_are_faster` in engine/layers/attention.py holds what came out. Heads are SmolLM2-135M's,
    Llama-3.2-1B's and Llama-3.1-8B's; the row is two of 4,096 tokens, of samples as chats have them.
    """
    return [case for heads in ((9, 3, 64), (32, 8, 64), (32, 8, 128)) for case in _beside_flash(*heads)]


def _beside_flash(heads: int, groups: int, features: int) -> list[Case]:
    from torch.nn.attention.varlen import varlen_attn

    lengths = torch.tensor([311, 1024, 96, 547, 208, 743, 181, 402, 584] * 2)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to("cuda", torch.int32)
    tokens, longest, scale = int(lengths.sum()), int(lengths.max()), features**-0.5
    q, dout = (_draw(tokens, heads, features).requires_grad_(i == 0) for i in range(2))
    k, v = (_draw(tokens, groups, features).requires_grad_() for _ in range(2))
    saved = ops.attention(q.detach(), k.detach(), v.detach(), ops.document_spans(offsets, tokens), scale)
    options = {"window_size": (-1, 0), "enable_gqa": True}
    options = {name: value for name, value in options.items() if name in inspect.signature(varlen_attn).parameters}

    def flash() -> Tensor:
        return varlen_attn(q, k, v, offsets, offsets, longest, longest, **options)

    def ours() -> Tensor:
        return ops.attention(q.detach(), k.detach(), v.detach(), ops.document_spans(offsets, tokens), scale)[0]

    def ours_backward() -> tuple[Tensor, ...]:
        given = (q.detach(), k.detach(), v.detach(), *saved, ops.document_spans(offsets, tokens))
        return ops.attention_backward(dout, *given, scale)

    out, name = flash(), f"ragged {tokens}x{heads}+{groups}x{features}, plain is flash"
    num_bytes, flops = 2 * q.nbytes + 2 * k.nbytes, 2 * heads * features * float((lengths**2).sum())
    return [
        Case(f"attention {name}", num_bytes, ours, lambda: flash().detach(), parity=1e-2, flops=flops),
        Case(
            f"attention_backward {name}",
            num_bytes,
            ours_backward,
            lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True),
            parity=1e-2,
            flops=2.5 * flops,
        ),
    ]


# Built one family at a time, so that memory is freed in between.
CASES = (
    _norm_cases, _rope_cases, _glu_cases, _glu_low_rank_cases, _nf4_cases, _loss_cases, _dropout_cases, _gather_cases,
    _attention_cases, _ragged_attention_cases,
)  # fmt: skip


def _case(name: str, num_bytes: int, op: str, arguments: tuple[object, ...]) -> Case:
    return Case(name, num_bytes, lambda: getattr(ops, op)(*arguments), lambda: getattr(reference, op)(*arguments))


def _in_place(name: str, num_bytes: int, op: str, tensors: list[Tensor], rest: tuple[object, ...]) -> Case:
    """Return a case whose two sides each write their own copies of `tensors`.

    While timed, the values drift from call to call, which does not change the time.
    """
    own, other = [t.clone() for t in tensors], [t.clone() for t in tensors]

    def run(module: object, tensors: list[Tensor]) -> list[Tensor]:
        getattr(module, op)(*tensors, *rest)
        return tensors

    return Case(name, num_bytes, lambda: run(ops, own), lambda: run(reference, other))


def _nf4_case(rows: int, columns: int, nested: bool) -> Case:
    from bitsandbytes import functional

    data, quant = functional.quantize_4bit(_draw(rows, columns), quant_type="nf4", compress_statistics=nested)
    state = ops.nf4_state(SimpleNamespace(data=data, quant_state=quant))
    return Case(
        f"dequantize_nf4{' nested' if nested else ''} {rows}x{columns}",
        data.nbytes + quant.absmax.nbytes + 2 * rows * columns,
        lambda: ops.dequantize_nf4(state, DTYPE),
        lambda: functional.dequantize_4bit(data, quant),
        exact=True,
    )


def tune(bandwidth: float) -> list[dict[str, object]]:
    """Time NF4 dequantisation of the largest weight for each tile size and number of warps."""
    from bitsandbytes import functional

    from engine.kernels.nf4 import launch_dequantize

    data, quant = functional.quantize_4bit(_draw(F, D), quant_type="nf4", compress_statistics=True)
    state = ops.nf4_state(SimpleNamespace(data=data, quant_state=quant))
    out = torch.empty(F, D, dtype=DTYPE, device="cuda")
    num_bytes = data.nbytes + quant.absmax.nbytes + out.nbytes
    rows = []
    for tile in (1024, 2048, 4096, 8192, 16384):
        for warps in (2, 4, 8, 16):
            spent = microseconds(lambda tile=tile, warps=warps: launch_dequantize(state, out, tile, warps))
            share = num_bytes / spent / 1e3 / bandwidth
            print(f"tile {tile:6} warps {warps:2} {spent:9,.1f} us  {share:5.0%} of copy")
            rows.append({"tile": tile, "warps": warps, "us": spent, "share_of_copy": share})
    return rows


if __name__ == "__main__":
    main()
