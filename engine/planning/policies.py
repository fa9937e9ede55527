"""The ways in which a decoder layer treats its activations, and how a model's layers share them out. No torch."""

from __future__ import annotations

from enum import StrEnum

from engine.config.trial import BOOL_POLICIES

GROUPS = {"qkv": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",), "gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
ATTENTION_PROJECTIONS = (*GROUPS["qkv"], *GROUPS["o"])


class Policy(StrEnum):
    """A layer keeps this from its forward to its backward pass."""

    KEEP = "keep"
    """All matmul outputs; norms, rotation and activation are recomputed."""
    HOST = "host"
    """The same, in host memory; of a row longer than a tile of the MLP, without the MLP's."""
    SELECTIVE = "selective"
    """Its input and all of attention; the MLP is recomputed."""
    RECOMPUTE = "recompute"
    """Its input only."""
    OFFLOAD = "offload"
    """Its input only, in host memory."""

    @classmethod
    def of(cls, setting: bool | str) -> Policy:
        """The policy that a setting of `train.activation_checkpointing` names."""
        return cls({value: name for name, value in BOOL_POLICIES.items()}.get(setting, setting))

    @property
    def setting(self) -> bool | str:
        """The setting of `train.activation_checkpointing` that names this policy."""
        return BOOL_POLICIES.get(self.value, self.value)

    @property
    def keeps_attention(self) -> bool:
        return self in (Policy.KEEP, Policy.HOST, Policy.SELECTIVE)

    @property
    def is_on_host(self) -> bool:
        return self in (Policy.HOST, Policy.OFFLOAD)


LADDER = (Policy.KEEP, Policy.SELECTIVE, Policy.RECOMPUTE, Policy.OFFLOAD)
"""The policies that `train.activation_checkpointing` can name, from most to least memory."""


def layer_policies(num_layers: int, policy: Policy, keep_layers: int, host_layers: int) -> list[Policy]:
    """The policy of each layer: the last `keep_layers` keep all; of the others, `host_layers` keep all on
    the host, spread evenly so that copies have the time of the layers between; the rest follow
    `policy`."""
    others = max(0, num_layers - keep_layers)
    spread = [Policy.HOST if i * host_layers % others < host_layers else policy for i in range(others)]
    return spread + [Policy.KEEP] * (num_layers - others)
