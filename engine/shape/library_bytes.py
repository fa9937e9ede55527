"""Hold the bytes that a library's own decoder layers allocate. No torch.

They are measured on the meta device (engine/model/library_layers.py), because a config.json does not say
what the layers keep.
"""

from __future__ import annotations

from dataclasses import dataclass

MEASURED_RANK = 8
"""The rank of the adapters under which the bytes were measured."""


@dataclass(frozen=True)
class PassBytes:
    """The bytes a token of one micro-batch, in 16 bits and without dequantised weights.

    - recomputes, dropout: True if layers keep their input only, and if the adapters drop inputs.
    - dora: True for adapters that train magnitudes (DoRA).
    - attention_alone: True if only linear layers of attention had adapters, False if all had one.
    - layer: what one layer leaves for its backward pass, and its output.
    - tail: what follows the last layer and stays until the loss, the final hidden states included.
    - forward, backward: the peak of a pass above the layers' inputs and what they leave.
    """

    recomputes: bool
    dropout: bool
    layer: int
    tail: int
    forward: int
    backward: int
    dora: bool = False
    attention_alone: bool = False


@dataclass(frozen=True)
class LibraryBytes:
    """What a library's layers allocate. alone: the bytes a token of a pass without gradients."""

    passes: tuple[PassBytes, ...]
    alone: int

    def of(self, recomputes: bool, dropout: bool, dora: bool = False, attention_alone: bool = False) -> PassBytes:
        """Return the bytes of a micro-batch under these conditions; with all layers adapted where nothing less was measured."""
        found = [one for one in self.passes if (one.recomputes, one.dropout, one.dora) == (recomputes, dropout, dora)]
        return next((one for one in found if one.attention_alone and attention_alone), found[0])
