"""Assume a card's speeds from its data sheet, where nobody has measured them. No torch.

They are shares of the data sheet's numbers. The shares come from kernel times of whole steps on ONE
card, an H100 SXM (torch 2.11, triton 3.6; Llama 8B and 1B). On another card they are an
EXTRAPOLATION: power limits (an L4's 72 W), clocks, and kernels chosen for Hopper change them.
"""

from __future__ import annotations

import functools

from engine.planning.cards import Card
from engine.planning.layer_work import ATTENTION_BACKWARD
from engine.planning.rates import Curve, Rates

# Shares of the data sheet's 989 TFLOP/s (H100): 785 in a layer's matmuls and 730 in the head's. An
# adapter's thin matmuls are bound by bytes up to a rank of about 100; beyond it, their share (an
# estimate) counts.
MATMUL, HEAD_MATMUL, THIN_MATMUL = 0.79, 0.74, 0.4
# Shares of 3,350 GB/s (H100): 2,850 in norms and the adapters' matmuls, 1,940 in the activation
# with low-rank terms, 2,400 in NF4.
BANDWIDTH, ACTIVATION_BANDWIDTH, NF4_BANDWIDTH = 0.85, 0.58, 0.72
# Time of a step relative to its kernels: 1.10, 1.10 and 1.11 in three steps (H100).
GAPS = 1.10
# Share of flash attention, if the card's own figure is not known. Samples of L tokens reach
# L / (L + 1000) of it.
ATTENTION, HALF_LENGTH = 0.6, 1000.0
# Python and launches of one layer, forward and backward, on an H100's host. 30 layers took 160 to
# 183 ms fused and 364 ms unfused. Other hosts are up to three times as fast.
HOST_MS, UNFUSED_HOST_MS = 5.5, 12.0


def rates_of(card: Card) -> Rates:
    """Return the card's measured rates, else those that its data sheet lets expect."""
    return card.rates or sheet_rates(card)


@functools.cache
def sheet_rates(card: Card) -> Rates:
    """Return the rates that the card's data sheet lets expect."""

    def flops(share: float) -> float:
        return share * card.bf16_tflops

    def moved(share: float) -> Curve:
        return Curve.flat(share * card.bandwidth_gb_s)

    return Rates(
        matmul_tflops=Curve.flat(flops(MATMUL)),
        head_tflops=Curve.flat(flops(HEAD_MATMUL)),
        norm_gb_s=moved(BANDWIDTH),
        adapter_gb_s=moved(BANDWIDTH),
        activation_gb_s=moved(ACTIVATION_BANDWIDTH),
        nf4_gb_s=moved(NF4_BANDWIDTH),
        gaps=Curve.flat(GAPS),
        attention_tflops=Curve.flat(card.attention_tflops or flops(ATTENTION)),
        half_length=Curve.flat(HALF_LENGTH),
        attention_backward=Curve.flat(ATTENTION_BACKWARD),
        thin_tflops=flops(THIN_MATMUL),
        loss_gb_s=BANDWIDTH * card.bandwidth_gb_s,
        link_gb_s=card.pcie_gb_s,
        host_ms=HOST_MS,
        unfused_host_ms=UNFUSED_HOST_MS,
    )
