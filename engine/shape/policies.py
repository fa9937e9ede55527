"""Define the policies by which layers keep activations, and share out the layers. No torch."""

from __future__ import annotations

from enum import StrEnum

from engine.config.trial import BOOL_POLICIES

GROUPS = ("qkv", "o", "gate_up", "down")
"""The groups of linear layers in a decoder layer. Those of a group read the same input."""


class Policy(StrEnum):
    """The activations that a layer keeps from its forward to its backward pass."""

    KEEP = "keep"
    """Keep all matmul outputs; recompute norms, rotation and activation."""
    HOST = "host"
    """Keep the same in host memory. In a row longer than an MLP tile keep only the input, attention's
    output and its log-sum-exp there, and compute all but attention again."""
    SELECTIVE = "selective"
    """Keep the input and all of attention; recompute the MLP."""
    RECOMPUTE = "recompute"
    """Keep the input only."""
    OFFLOAD = "offload"
    """Keep the input only, in host memory."""

    @classmethod
    def of(cls, setting: bool | str) -> Policy:
        """Return the policy that a setting of `train.activation_checkpointing` names."""
        return cls({value: name for name, value in BOOL_POLICIES.items()}.get(setting, setting))

    @property
    def setting(self) -> bool | str:
        """Return the setting of `train.activation_checkpointing` that names this policy."""
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
    """Return the policy of each layer.

    The last `keep_layers` layers keep all. Of the others, `host_layers` keep all on the host. They
    are spread evenly, so that copies can run during the layers between. The rest follow `policy`.
    """
    others = max(0, num_layers - keep_layers)
    spread = [Policy.HOST if i * host_layers % others < host_layers else policy for i in range(others)]
    return spread + [Policy.KEEP] * (num_layers - others)
