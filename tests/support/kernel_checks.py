"""Share the means of the kernel tests: devices, random operands, comparison with fp64 results.

On a CUDA device the tests run there. Elsewhere they run in Triton's interpreter, which
tests/conftest.py asks for.
"""

import pytest
import torch

from engine.kernels import ops, reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.bfloat16, torch.float32]
# A kernel's error may exceed torch's by this much, relative to the largest true value: fp32
# rounding accumulates in another order.
SLACK = {torch.bfloat16: 1e-4, torch.float16: 2e-5, torch.float32: 2e-6}


@pytest.fixture(autouse=True, params=["kernel", "reference"])
def implementation(request, monkeypatch):
    """Run each test of the importing module against both, with fresh outputs full of NaN."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    if request.param == "reference":
        monkeypatch.setattr(ops, "_family", lambda name, tensor: reference)
    elif not CUDA:
        pytest.importorskip("triton")
        monkeypatch.setattr(ops, "FORCE_TRITON", True)
        _round_as_a_gpu_does(monkeypatch)
        _multiply_as_a_gpu_does(monkeypatch)
        _fuse_as_a_gpu_does(monkeypatch)
    return request.param


def _poisoned(allocate):
    def fill(*args, **options):
        tensor = allocate(*args, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return fill


def _round_as_a_gpu_does(monkeypatch):
    """Round to nearest even, as GPUs do; Triton's interpreter truncates fp32 to bf16."""
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data, source, target, mode):
        if source != tl.float32 or target != tl.bfloat16:
            return convert(data, source, target, mode)
        return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def _multiply_as_a_gpu_does(monkeypatch):
    """Multiply bf16 matrices as numbers; Triton's interpreter multiplies their bits as integers."""
    from triton import language as tl
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        values = torch.from_numpy(x.data.copy()).view(torch.bfloat16).float()
        return interpreter.TensorHandle(values.numpy(), tl.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest)
    )


def _fuse_as_a_gpu_does(monkeypatch):
    """Round x * y + z once; Triton's interpreter rounds the product too."""
    from triton.runtime import interpreter

    def fused(self, x, y, z):
        total = x.data.astype("float64") * y.data + z.data
        return interpreter.TensorHandle(total.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fused)


def draw(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def error(ours, truth):
    """Return the largest deviation, relative to the largest true value; NaN counts as infinite."""
    deviation = ((ours.double() - truth).abs().max() / truth.abs().max()).item()
    return float("inf") if deviation != deviation else deviation


def as_good_as_torch(ours, plain, truth):
    return error(ours, truth) <= error(plain, truth) + SLACK[ours.dtype]


def same_as_dense(implementation, ours, dense):
    """Return True if strided operands gave what dense ones do.

    A kernel must agree bit for bit, torch within rounding: torch vectorises strided and dense
    tensors differently from CPU to CPU.
    """
    return torch.equal(ours, dense) if implementation == "kernel" else error(ours, dense.double()) <= SLACK[ours.dtype]


def plain_glu(gate, up, activation, dtype):
    gate, up = gate.to(dtype), up.to(dtype)
    act = torch.nn.functional.silu(gate) if activation == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")
    return act * up
