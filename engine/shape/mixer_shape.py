"""Count the sizes of the library's token mixer in a layer without attention. No torch.

The only kind that is counted is the gated delta rule (Yang et al., arXiv:2412.06464) as transformers
has it for Qwen3.5: a short convolution over queries, keys and values, a state for each head, and a
gated norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MIXER = "mixer"
"""Stands for all projections of a library's mixer among the groups."""
CHUNK = 64
"""Tokens that the rule computes at once. A sample is padded to whole chunks."""


@dataclass(frozen=True)
class MixerShape:
    """The sizes of a gated delta rule: heads and features of a head, and the convolution's width.

    has_kernels: True if flash-linear-attention computes the rule, False for the library's torch
    operations, which keep far more. is_recordable: True if a CUDA graph can hold the mixer, which
    takes kernels that read where samples begin from the device.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int
    has_kernels: bool = False
    is_recordable: bool = False

    @classmethod
    def of(cls, number: Callable[..., int]) -> MixerShape:
        """Return the sizes in a config; `number(key, default)` reads one. Defaults: transformers 5.23."""
        return cls(
            number("linear_num_key_heads", 16),
            number("linear_num_value_heads", 32),
            number("linear_key_head_dim", 128),
            number("linear_value_head_dim", 128),
            number("linear_conv_kernel_dim", 4),
        )

    @property
    def values(self) -> int:
        """Return the features of all heads' values."""
        return self.value_heads * self.value_dim

    @property
    def repeated_keys(self) -> int:
        """Return the features of keys, or queries, once each value head has its own."""
        return self.value_heads * self.key_dim

    @property
    def convolved(self) -> int:
        """Return the channels of the convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.values

    @property
    def vector_parameters(self) -> int:
        """Return the number of weights outside the linear layers: convolution, decay, time step, norm."""
        return self.convolved * self.conv_width + 2 * self.value_heads + self.value_dim

    def projections(self, hidden_size: int) -> dict[str, tuple[int, int]]:
        """Return (output, input) features of its linear layers, by name."""
        outputs = {
            "in_proj_qkv": self.convolved, "in_proj_z": self.values, "in_proj_b": self.value_heads, "in_proj_a": self.value_heads,
        }  # fmt: skip
        return {**{name: (size, hidden_size) for name, size in outputs.items()}, "out_proj": (hidden_size, self.values)}
