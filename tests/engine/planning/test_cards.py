"""A card is found by its short name and by torch's name for it."""

from __future__ import annotations

import pytest

from engine.errors import InputError
from engine.planning.cards import find_card, match_card


def test_an_unknown_card_is_an_input_error_with_a_near_name() -> None:
    assert find_card("rtx4090").memory_gib == 23.6
    with pytest.raises(InputError, match=r"card = 'RTX 4090': unknown card; known: rtx3090, .*did you mean 'rtx4090'\?"):
        find_card("RTX 4090")


@pytest.mark.parametrize(
    ("device_name", "expected"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 3090 Ti", "rtx3090ti"), ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA A10G", "a10g"), ("NVIDIA A10", "a10"), ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"), ("NVIDIA RTX A5000", "a5000"), ("NVIDIA RTX A6000", "a6000"), ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA A100-SXM4-80GB", "a100-80"), ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA H100 PCIe", None), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_cards_are_known_by_the_names_torch_gives_them(device_name: str, expected: str | None) -> None:
    matched = match_card(device_name)
    assert (matched and matched.name) == expected
