"""Time the eight-bit kernels at the shapes of Llama-3.1-8B.

Run `python -m engine.kernels.eight_bit.int8_bench` on a CUDA device; it takes about a minute.

Each case is checked for parity before it is timed, as in `engine.kernels.bench`. "plain" is what
bf16 training does in its place: dequantisation for the unpacking, a copy for the rows, torch's bf16
matmul for the products. For a gradient that comes with its codes it is the kernels apart. `--tune`
times the int8 matmul over tiles instead, next to torch's int8 and FP8 matmuls.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from engine.errors import EngineError
from engine.kernels import ops
from engine.kernels.bench import copy_bandwidth, microseconds
from engine.kernels.eight_bit import int8_ops, int8_reference
from engine.kernels.eight_bit.int8_matmul import launch_matmul
from engine.kernels.eight_bit.int8_ops import Int8Rows
from engine.kernels.eight_bit.int8_tiles import CANDIDATES, Tile
from engine.kernels.nf4_state import Nf4State
from engine.kernels.reference import LowRank

T, D, F, QKV, R = 4096, 4096, 14336, 6144, 16
DTYPE = torch.bfloat16
# name: N, K, and whether the product adds a low-rank term
PRODUCTS = {
    "qkv": (QKV, D, False),
    "o": (D, D, True),
    "gate_up": (2 * F, D, False),
    "down": (D, F, True),
    "gate_up gradient": (D, 2 * F, True),
    "down gradient": (F, D, False),
}
PARITY = 5e-4  # as in engine.kernels.bench
AWAY = 5e-3  # of rotated codes: few values lie on the edge between two codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="time the int8 matmul over tiles")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("engine.kernels.eight_bit.int8_bench: needs a CUDA device")
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}, copy {copy_bandwidth():,.0f} GB/s")
    rows = tune() if options.tune else measure()
    print(json.dumps({"device": device, "torch": torch.__version__, "triton": triton.__version__, "ops": rows}))


def random_weight(rows: int, columns: int) -> Nf4State:
    """Return a double-quantised weight of random codes and block scales."""
    blocks = rows * columns // 64
    code = torch.linspace(-1.0, 1.0, 16, device="cuda")
    return Nf4State(
        torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8, device="cuda"), (rows, columns), code,
        torch.randint(0, 256, (blocks,), dtype=torch.uint8, device="cuda"), 64,
        torch.linspace(-0.02, 0.02, 256, device="cuda"), torch.ones(-(-blocks // 256), device="cuda"),
        torch.tensor(0.03, device="cuda"),
    )  # fmt: skip


def random_product(columns: int, reduced: int, with_term: bool) -> tuple[Int8Rows, Int8Rows, LowRank | None]:
    """Return the codes of normal values, and a term of rank 16."""
    a, b = (int8_ops.quantize_rows(torch.randn(rows, reduced, device="cuda", dtype=DTYPE)) for rows in (T, columns))
    low, low_b = (torch.randn(rows, R, device="cuda", dtype=DTYPE) for rows in (T, columns))
    return a, b, LowRank(low, low_b) if with_term else None


def _row(
    name: str, ours: Callable[[], object], plain: Callable[[], object], num_bytes: int = 0, flops: int = 0
) -> dict[str, object]:
    spent, beside = microseconds(ours), microseconds(plain)
    rate = f"{flops / spent / 1e6:7,.0f} TOPS" if flops else f"{num_bytes / spent / 1e3:7,.0f} GB/s"
    print(f"{name:50} {spent:9,.1f} us  plain {beside:9,.1f} us  x{beside / spent:5.2f}  {rate}", flush=True)
    return {"op": name, "us": spent, "plain_us": beside, "gb_s": num_bytes / spent / 1e3, "tops": flops / spent / 1e6}


def _check(name: str, ours: Tensor, truth: Tensor, allowed: float) -> None:
    deviation = ((ours.double() - truth.double()).norm() / truth.double().norm()).item()
    if not deviation <= allowed:
        raise EngineError(f"{name}: differs from plain by {deviation:.2e}, allowed is {allowed}")


def _unpacking(is_rotated: bool, transposed: bool) -> dict[str, object]:
    states = [random_weight(F, D)]
    scales, packed = int8_ops.weight_scales(states, is_rotated), states[0].packed.nbytes + states[0].absmax_M.nbytes
    kind = "columns" if transposed else "rows"
    unpack, plain = getattr(int8_ops, f"unpack_{kind}"), getattr(int8_reference, f"unpack_{kind}_")
    ours, name = unpack(states, scales).codes_NK, f"unpack_{kind}{' rotated' if is_rotated else ''} {F}x{D}"
    expected = torch.empty_like(ours)
    plain(states, scales, expected)
    _check(name, ours, expected, AWAY if is_rotated else 0.0)
    return _row(name, lambda: unpack(states, scales), lambda: ops.dequantize_nf4(states[0], DTYPE), packed + ours.nbytes)


def _quantising(width: int, is_rotated: bool) -> dict[str, object]:
    x = torch.randn(T, width, device="cuda", dtype=DTYPE)
    name, copy = f"quantize_rows{' rotated' if is_rotated else ''} {T}x{width}", torch.empty_like(x)
    expected = int8_reference.quantize_rows(x, is_rotated).codes_NK
    _check(name, int8_ops.quantize_rows(x, is_rotated).codes_NK, expected, AWAY if is_rotated else 0.0)
    return _row(name, lambda: int8_ops.quantize_rows(x, is_rotated), lambda: copy.copy_(x), x.nbytes + x.nbytes // 2)


def _gated() -> dict[str, object]:
    dh, gate_up, name = *(torch.randn(T, width, device="cuda", dtype=DTYPE) for width in (F, 2 * F)), f"gated gradient {T}x{F}"
    copies = dh.clone(), gate_up.clone()
    rows = int8_ops.glu_backward_codes_(*copies, "silu")
    _check(f"{name} codes", rows.codes_NK, int8_reference.quantize_rows(copies[1], False).codes_NK, 0.0)
    expected = dh.clone(), gate_up.clone()
    ops.glu_backward_(expected[0], *expected[1].chunk(2, dim=1), "silu")
    _check(name, copies[1], expected[1], PARITY)

    def apart() -> Int8Rows:
        ops.glu_backward_(dh, *gate_up.chunk(2, dim=1), "silu")
        return int8_ops.quantize_rows(gate_up)

    moved = 2 * dh.nbytes + 2 * gate_up.nbytes + gate_up.numel()
    return _row(f"{name}, codes", lambda: int8_ops.glu_backward_codes_(dh, gate_up, "silu"), apart, moved)


def _product(name: str) -> dict[str, object]:
    columns, reduced, with_term = PRODUCTS[name]
    a, b, term = random_product(columns, reduced, with_term)
    shown = f"matmul {name} {T}x{columns}x{reduced}{' + term' if with_term else ''}"
    _check(shown, int8_ops.matmul(a, b, DTYPE, term), int8_reference.matmul(a, b, DTYPE, term, None), PARITY)
    x, w = (torch.randn(rows, reduced, device="cuda", dtype=DTYPE) for rows in (T, columns))
    return _row(shown, lambda: int8_ops.matmul(a, b, DTYPE, term), lambda: x @ w.t(), flops=2 * T * columns * reduced)


def _whole(rows: int, columns: int, name: str, backward: bool) -> dict[str, object]:
    """Return one whole use of a frozen weight: codes of both operands and the product, next to bf16's two steps."""
    state, x = random_weight(rows, columns), torch.randn(T, rows if backward else columns, device="cuda", dtype=DTYPE)
    scales = int8_ops.weight_scales([state], True)

    def ours() -> Tensor:
        if backward:
            return int8_ops.matmul(int8_ops.quantize_rows(x), int8_ops.unpack_columns([state], scales), DTYPE)
        return int8_ops.matmul(int8_ops.quantize_rows(x, True), int8_ops.unpack_rows([state], scales), DTYPE)

    def plain() -> Tensor:
        weight = ops.dequantize_nf4(state, DTYPE)
        return x @ (weight if backward else weight.t())

    shown = f"{name} {'backward' if backward else 'forward, rotated'}"
    _check(shown, ours(), plain(), 0.03)
    return _row(shown, ours, plain, flops=2 * T * rows * columns)


def measure() -> list[dict[str, object]]:
    found = [_unpacking(*how) for how in ((False, False), (True, False), (False, True))]
    found += [_quantising(*how) for how in ((D, False), (QKV, False), (2 * F, False), (D, True), (F, True))]
    found += [_gated(), *(_product(name) for name in PRODUCTS)]
    wholes = (2 * F, D, "gate_up"), (D, F, "down"), (D, D, "o")
    return found + [_whole(*sizes, backward) for sizes in wholes for backward in (False, True)]


def tune() -> list[dict[str, object]]:
    """Time each candidate at each product's shape; one that cannot be launched is named and skipped."""
    found = []
    for name, (columns, reduced, with_term) in PRODUCTS.items():
        a, b, term = random_product(columns, reduced, with_term)
        flops = 2 * T * columns * reduced
        others = _library_matmuls(a, b)
        calls = others | {str(tile): _tried(a, b, term, tile) for tile in CANDIDATES}
        for kind, call in calls.items():
            try:
                spent = microseconds(call)
            except Exception as error:
                print(f"{name:18} {kind}: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
                continue
            print(f"{name:18} {spent:9,.1f} us {flops / spent / 1e6:7,.0f} TOPS  {kind}", flush=True)
            found.append({"product": name, "kind": kind, "us": spent, "tops": flops / spent / 1e6})
    return found


def _tried(a: Int8Rows, b: Int8Rows, term: LowRank | None, tile: Tile) -> Callable[[], Tensor]:
    return lambda: launch_matmul(a, b, DTYPE, term, None, tile)


def _library_matmuls(a: Int8Rows, b: Int8Rows) -> dict[str, Callable[[], Tensor]]:
    """Return torch's products of the same sizes: bf16, int8 to int32, and FP8 with a scale for each row."""
    wide, narrow = ([rows.codes_NK.to(dtype) for rows in (a, b)] for dtype in (DTYPE, torch.float8_e4m3fn))
    scales = a.scale_N[:, None].contiguous(), b.scale_N[None, :].contiguous()
    return {
        "torch bf16": lambda: wide[0] @ wide[1].t(),
        "torch._int_mm": lambda: torch._int_mm(a.codes_NK, b.codes_NK.t()),
        "torch._scaled_mm fp8": lambda: torch._scaled_mm(narrow[0], narrow[1].t(), *scales, out_dtype=DTYPE, use_fast_accum=True),
    }


if __name__ == "__main__":
    main()
