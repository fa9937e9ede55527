"""What a decoder layer can do with its activations, and how a model's layers share that out. No torch."""

from __future__ import annotations

from typing import Literal

GROUPS = {"qkv": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",), "gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
ATTENTION_PROJECTIONS = (*GROUPS["qkv"], *GROUPS["o"])
PolicyName = Literal["keep", "host", "selective", "recompute", "offload"]
POLICIES: dict[bool | str, PolicyName] = {False: "keep", "selective": "selective", True: "recompute", "offload": "offload"}
"""Setting of `train.activation_checkpointing` -> what a layer does, from most to least memory."""


def layer_policies(num_layers: int, policy: PolicyName, keep_layers: int, host_layers: int) -> list[PolicyName]:
    """Of each layer: the last `keep_layers` keep all; of the others, `host_layers` keep all on the host, spread evenly so that
    copies have the time of the layers between; the rest follow `policy`."""
    others = max(0, num_layers - keep_layers)
    spread: list[PolicyName] = ["host" if i * host_layers % others < host_layers else policy for i in range(others)]
    return spread + ["keep"] * (num_layers - others)
