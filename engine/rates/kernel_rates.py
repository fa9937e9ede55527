"""Measure the rates of the kernels that a training step is made of, one kind a function.

Each function takes a `Timer`, and gives a rate in the unit of its name. Bytes and operations are
counted as engine/planning counts them, so that a predicted time is the measured one.

Shape letters: T tokens, D hidden, F MLP hidden, O output features, V vocabulary, C rows of a chunk
of logits, R rank, H query heads, G key/value heads, K head dim, L tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import ops
from engine.kernels.eight_bit import int8_ops
from engine.layers.attention import AttentionOptions, Documents, attend
from engine.planning.rates import CODE_BYTES, PLAIN_BYTES
from engine.quant.bnb import quantize_nf4
from engine.rates.timing import Timer
from engine.rates.widths import Widths
from engine.shape.compute_limits import LOSS_CHUNK_BYTES

Draw = Callable[..., Tensor]
RANK, HIGH_RANK = 16, 256  # bytes bind an adapter's matmuls at the first, arithmetic at the second
# Samples of two lengths. No multiple of 256, so that they run as ragged rows do.
LENGTHS = (1000, 8000)
EPS = 1e-5


def drawing(device: torch.device, dtype: torch.dtype) -> Draw:
    """Return a function that makes a tensor of normal values: draw(rows, columns)."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)


def matmul_tflops(timer: Timer, draw: Draw, widths: Widths) -> float:
    """Return TFLOP/s of a layer's products, forward and for the input's gradient."""
    seconds = flops = 0.0
    for num_out, num_in in widths.products.values():
        x_TD, dy_TO, weight_OD = draw(widths.tokens, num_in), draw(widths.tokens, num_out), draw(num_out, num_in)
        seconds += timer(lambda x=x_TD, w=weight_OD: F.linear(x, w)) + timer(lambda dy=dy_TO, w=weight_OD: dy @ w)
        flops += 2 * 2 * widths.tokens * num_out * num_in
    return flops / seconds / 1e12


def head_tflops(timer: Timer, draw: Draw, widths: Widths) -> float:
    """Return TFLOP/s of the head's products on one chunk of logits, as the loss computes them."""
    rows = max(1, min(widths.tokens, LOSS_CHUNK_BYTES // (2 * widths.vocabulary)))
    h_CD, weight_VD = draw(rows, widths.hidden), draw(widths.vocabulary, widths.hidden)
    logits_CV = h_CD @ weight_VD.t()
    seconds = timer(lambda: F.linear(h_CD, weight_VD)) + timer(lambda: logits_CV @ weight_VD)
    return 2 * 2 * rows * widths.vocabulary * widths.hidden / seconds / 1e12


def loss_gb_s(timer: Timer, draw: Draw, widths: Widths) -> float:
    """Return GB/s of the loss over logits: they count as moved four times."""
    rows = max(1, min(widths.tokens, LOSS_CHUNK_BYTES // (2 * widths.vocabulary)))
    logits_CV = draw(rows, widths.vocabulary)
    labels_C = torch.arange(rows, device=logits_CV.device) % widths.vocabulary
    return 4 * 2 * logits_CV.numel() / timer(lambda: ops.cross_entropy_(logits_CV, labels_C)) / 1e9


def norm_gb_s(timer: Timer, draw: Draw, widths: Widths) -> float:
    """Return GB/s of the norms: alone, after a residual sum, and backward with the residual."""
    x_TD, delta_TD, weight_D = draw(widths.tokens, widths.hidden), draw(widths.tokens, widths.hidden), draw(widths.hidden)
    _, rstd_T = ops.rms_norm(x_TD, weight_D, EPS)
    seconds = (
        timer(lambda: ops.rms_norm(x_TD, weight_D, EPS))
        + timer(lambda: ops.add_rms_norm(x_TD, delta_TD, weight_D, EPS))
        + timer(lambda: ops.rms_norm_backward(delta_TD, x_TD, weight_D, rstd_T, 0.0, delta_TD))
    )
    return (2 + 4 + 4) * 2 * x_TD.numel() / seconds / 1e9


def adapter_gb_s(timer: Timer, draw: Draw, widths: Widths) -> float:
    """Return GB/s of the activations that an adapter of low rank reads and writes, both passes."""
    x_TD, y_TD, dy_TD = (draw(widths.tokens, widths.hidden) for _ in range(3))
    a_RD, b_DR, low_TR = draw(RANK, widths.hidden), draw(widths.hidden, RANK), draw(widths.tokens, RANK)
    seconds = (
        timer(lambda: x_TD @ a_RD.t())
        + timer(lambda: y_TD.addmm_(low_TR, b_DR.t()))
        + timer(lambda: dy_TD @ b_DR)
        + timer(lambda: dy_TD.t() @ low_TR)
        + timer(lambda: low_TR.t() @ x_TD)
        + timer(lambda: y_TD.addmm_(low_TR, a_RD))
    )
    return (1 + 2 + 1 + 1 + 1 + 2) * 2 * x_TD.numel() / seconds / 1e9


def thin_tflops(timer: Timer, draw: Draw, widths: Widths) -> float:
    """Return TFLOP/s of the matmuls of an adapter of high rank, both passes."""
    x_TD, dy_TD = draw(widths.tokens, widths.hidden), draw(widths.tokens, widths.hidden)
    a_RD, b_DR, low_TR = draw(HIGH_RANK, widths.hidden), draw(widths.hidden, HIGH_RANK), draw(widths.tokens, HIGH_RANK)
    calls = (lambda: x_TD @ a_RD.t(), lambda: low_TR @ b_DR.t(), lambda: dy_TD @ b_DR, lambda: dy_TD.t() @ low_TR)
    return len(calls) * 2 * x_TD.numel() * HIGH_RANK / sum(map(timer, calls)) / 1e12


def activation_gb_s(timer: Timer, draw: Draw, widths: Widths) -> float:
    """Return GB/s of the gated activation with low-rank terms, both passes."""
    gate_TF, up_TF, dh_TF = (draw(widths.tokens, widths.mlp) for _ in range(3))
    terms = [ops.LowRank(draw(widths.tokens, RANK), draw(widths.mlp, RANK)) for _ in range(3)]
    seconds = timer(lambda: ops.glu(gate_TF, up_TF, "silu", *terms[:2]))
    seconds += timer(lambda: ops.glu_backward_(dh_TF, gate_TF, up_TF, "silu", *terms))
    return (3 + 6) * 2 * gate_TF.numel() / seconds / 1e9


def nf4_gb_s(timer: Timer, draw: Draw, widths: Widths) -> float:
    """Return GB/s of dequantising the four weights of a layer."""
    seconds = num_bytes = 0.0
    for num_out, num_in in widths.products.values():
        state = ops.nf4_state(quantize_nf4(draw(num_out, num_in), double_quantization=True))
        out = draw(num_out, num_in)
        seconds += timer(lambda state=state, out=out: ops.dequantize_nf4(state, out.dtype, out))
        num_bytes += PLAIN_BYTES * num_out * num_in
    return num_bytes / seconds / 1e9


def int8_matmul_tops(timer: Timer, draw: Draw, widths: Widths) -> float:
    """Return TOPS of a layer's products in INT8, forward and for the input's gradient."""
    seconds, operations, dtype = 0.0, 0.0, draw(1).dtype
    for num_out, num_in in widths.products.values():
        for columns, reduced in ((num_out, num_in), (num_in, num_out)):
            x, w = (int8_ops.quantize_rows(draw(rows, reduced)) for rows in (widths.tokens, columns))
            seconds += timer(lambda x=x, w=w: int8_ops.matmul(x, w, dtype))
            operations += 2 * widths.tokens * columns * reduced
    return operations / seconds / 1e12


def int8_forward_gb_s(timer: Timer, draw: Draw, widths: Widths) -> float:
    """Return GB/s of making the codes of a layer's four weights for the forward pass, rotated."""
    return _codes_gb_s(timer, draw, widths, int8_ops.unpack_rows)


def int8_backward_gb_s(timer: Timer, draw: Draw, widths: Widths) -> float:
    """Return GB/s of making the codes of a layer's four weights for the input's gradient."""
    return _codes_gb_s(timer, draw, widths, int8_ops.unpack_columns)


def _codes_gb_s(timer: Timer, draw: Draw, widths: Widths, unpack: Callable[..., object]) -> float:
    seconds = num_bytes = 0.0
    for num_out, num_in in widths.products.values():
        state = ops.nf4_state(quantize_nf4(draw(num_out, num_in), double_quantization=True))
        scales = int8_ops.weight_scales([state], True)
        seconds += timer(lambda state=state, scales=scales: unpack([state], scales))
        num_bytes += CODE_BYTES * num_out * num_in
    return num_bytes / seconds / 1e9


def int8_rows_gb_s(timer: Timer, draw: Draw, widths: Widths) -> float:
    """Return GB/s of making the codes of what a layer's products read: inputs, rotated, and gradients."""
    seconds = num_bytes = 0.0
    for num_out, num_in in widths.products.values():
        for width, is_rotated in ((num_in, True), (num_out, False)):
            x = draw(widths.tokens, width)
            seconds += timer(lambda x=x, is_rotated=is_rotated: int8_ops.quantize_rows(x, is_rotated))
            num_bytes += 1.5 * 2 * x.numel()
    return num_bytes / seconds / 1e9


def copy_gb_s(timer: Timer, draw: Draw, num_values: int = 2**27) -> float:
    """Return GB/s, read plus written, of a large copy on the card."""
    source = draw(num_values)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timer(lambda: target.copy_(source)) / 1e9


def attention_seconds(timer: Timer, draw: Draw, widths: Widths, length: int) -> tuple[float, float]:
    """Return the seconds of attention over samples of `length` tokens, forward and backward."""
    num_samples = max(1, max(LENGTHS) // length)
    q, k, v = (draw(num_samples * length, n, widths.head_dim).requires_grad_() for n in (widths.heads, *[widths.kv_heads] * 2))
    offsets = torch.arange(num_samples + 1, dtype=torch.int32, device=q.device) * length
    documents = Documents((length,) * num_samples, offsets)
    out = attend(q, k, v, documents, AttentionOptions())
    grad = torch.ones_like(out)

    def forward() -> None:
        with torch.no_grad():
            attend(q, k, v, documents, AttentionOptions())

    return timer(forward), timer(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))


def attention_rates(seconds: dict[int, tuple[float, float]], widths: Widths) -> tuple[float, float, float]:
    """Return TFLOP/s on endless samples, the half length, and the backward pass's share of it.

    `seconds`: of forward and backward, by the length of the samples. A sample of L tokens reaches
    L / (L + half length) of the rate, so 1 / rate is a straight line over 1 / L.
    """
    (short, (short_s, _)), (long, (long_s, backward_s)) = sorted(seconds.items())
    ours = {n: attention_flops(widths, n) / s / 1e12 for n, s in ((short, short_s), (long, long_s))}
    slope = (1 / ours[short] - 1 / ours[long]) / (1 / short - 1 / long)
    slope = max(slope, 1.0 / ours[long] / 1e3)  # short samples as fast as long ones: a half length of about 1
    endless = 1 / max(1 / ours[long] - slope / long, 0.5 / ours[long])
    half_length = max(1.0, slope * endless)
    backward = 2.5 * attention_flops(widths, long) / backward_s / 1e12
    return endless, half_length, backward / ours[long]


def attention_flops(widths: Widths, length: int) -> float:
    """Return the operations of a forward pass, half of the scores masked: 2 T L H K."""
    num_samples = max(1, max(LENGTHS) // length)
    return 2.0 * num_samples * length * length * widths.heads * widths.head_dim
