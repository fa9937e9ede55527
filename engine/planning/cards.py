"""List CUDA cards with the numbers of their data sheets. No torch.

- bf16_tflops: dense tensor-core throughput with fp32 accumulation, as training uses it. Data sheets
  also print twice that (sparsity), and GeForce cards do half of their fp16-accumulate figure.
- memory_gib: the card's total as CUDA reports it (`torch.cuda.mem_get_info`). It is less than the
  name says, because ECC, page tables and the driver take their part.
- pcie_gb_s: the speed of pinned copies one way, about 80 % of the link.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from engine.errors import InputError, did_you_mean
from engine.planning.rates import Rates

# GB/s of a pinned copy one way over 16 lanes. PCIe 5 is measured on an H100. PCIe 4
# reaches less than half of that.
PCIE_4, PCIE_5 = 25.0, 53.6
# TFLOP/s, measured on an H100: the flash attention 2 of torch 2.11 does not use Hopper's own
# instructions.
FLASH_ON_HOPPER = 360.0


@dataclass(frozen=True)
class Card:
    """The numbers of one card, with units in the names.

    `attention_tflops` is the speed of flash attention on long samples, if known. Without it,
    engine/planning/sheet_rates.py takes a share of bf16_tflops. `rates` are what such a card was measured
    at, and `measured` says where. has_grouped_products: torch multiplies rows by many matrices in one
    fast kernel there (Hopper).
    """

    name: str
    memory_gib: float
    bandwidth_gb_s: float
    bf16_tflops: float
    pcie_gb_s: float
    attention_tflops: float | None = None
    rates: Rates | None = None
    measured: str | None = None
    has_grouped_products: bool = False


CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        # Ampere GA102 whitepaper, table 9: 71 TFLOPS fp16/bf16 with fp32 accumulate, 936 GB/s
        Card("rtx3090", 23.6, 936, 71.0, PCIE_4),
        # the same with 84 SMs at 1.86 GHz, 1,008 GB/s (product page)
        Card("rtx3090ti", 23.6, 1008, 80.0, PCIE_4),
        # NVIDIA Ada whitepaper, appendix A: 165.2 with fp32 accumulate, 1,008 GB/s
        Card("rtx4090", 23.6, 1008, 165.2, PCIE_4),
        # NVIDIA RTX Blackwell whitepaper, appendix A: 209.5 with fp32 accumulate, 1,792 GB/s, 32 GB
        Card("rtx5090", 31.3, 1792, 209.5, PCIE_5),
        # A10 data sheet: 125 (250 sparse), 600 GB/s, 150 W
        Card("a10", 22.0, 600, 125.0, PCIE_4),
        # A10G data sheet: 70 (140 sparse), 600 GB/s
        Card("a10g", 22.0, 600, 70.0, PCIE_4),
        # L4 data sheet: 242 sparse, 300 GB/s. 72 W: sustained matmuls run well below the 121
        Card("l4", 22.0, 300, 121.0, PCIE_4),
        # RTX A5000 data sheet: 222.2 sparse, 768 GB/s
        Card("a5000", 23.6, 768, 111.1, PCIE_4),
        # RTX A6000 data sheet: 309.7 sparse, 768 GB/s, 48 GB
        Card("a6000", 47.4, 768, 154.8, PCIE_4),
        # L40S data sheet: 362 (733 sparse), 864 GB/s, 48 GB with ECC
        Card("l40s", 44.4, 864, 362.0, PCIE_4),
        # A100 data sheet: 312, 40 GB at 1,555 GB/s
        Card("a100-40", 39.4, 1555, 312.0, PCIE_4),
        # A100 data sheet: 312, 80 GB at 2,039 GB/s (SXM)
        Card("a100-80", 79.1, 2039, 312.0, PCIE_4),
        # H100 data sheet, SXM: 1,979 sparse, 3,350 GB/s
        Card("h100", 79.1, 3350, 989.0, PCIE_5, FLASH_ON_HOPPER, has_grouped_products=True),
        # H200 data sheet, SXM: 1,979 sparse, 4,800 GB/s
        Card("h200", 139.8, 4800, 989.0, PCIE_5, FLASH_ON_HOPPER, has_grouped_products=True),
    )
}


def find_card(name: str) -> Card:
    """Return the card of this name in CARDS; raise InputError if there is none."""
    if name not in CARDS:
        hint = did_you_mean(name.lower().replace(" ", "").replace("_", "-"), CARDS, cutoff=0.5)
        raise InputError("card", name, f"unknown card; known: {', '.join(CARDS)}{hint}")
    return CARDS[name]


DEVICE_NAMES: dict[str, str] = {
    "rtx3090": r"GeForce RTX 3090", "rtx3090ti": r"GeForce RTX 3090 Ti", "rtx4090": r"GeForce RTX 4090",
    "rtx5090": r"GeForce RTX 5090", "a10": r"A10", "a10g": r"A10G", "l4": r"L4", "a5000": r"RTX A5000", "a6000": r"RTX A6000",
    "l40s": r"L40S", "a100-40": r"A100-(SXM4|PCIE|PCIe)-40GB", "a100-80": r"A100(-SXM4-80GB|-SXM-80GB| 80GB PCIe|-PCIE-80GB)",
    "h100": r"H100 80GB HBM3", "h200": r"H200",
}  # fmt: skip
"""Card -> pattern for the whole of torch.cuda.get_device_name() after "NVIDIA ".

A 4090 D, a laptop's 4090 or an H100 PCIe is another card.
"""


# A modest card: a plan depends only on the ratios of its numbers.
UNKNOWN = Card("unknown", 0.0, 600.0, 60.0, 12.0)


def found_card(device_name: str, memory_gib: float) -> Card:
    """Return the card of a device, with the given memory.

    If the device is not in CARDS, its speed is a guess.
    """
    return replace(match_card(device_name) or UNKNOWN, name=device_name, memory_gib=memory_gib)


def match_card(device_name: str) -> Card | None:
    """Return the card that torch.cuda.get_device_name() means, or None if it is not in CARDS."""
    name = device_name.strip().removeprefix("NVIDIA ")
    return next((CARDS[known] for known, pattern in DEVICE_NAMES.items() if re.fullmatch(pattern, name)), None)
