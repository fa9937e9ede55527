"""Name the widths at which a card is measured: those of a small, a middle and a large model. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Widths:
    """The sizes of a decoder layer and of its head.

    name: for the lines that people read. model: in engine/bench/shapes.py. tokens: rows of the
    measured matrices.
    """

    name: str
    model: str
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tokens: int

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """Return (output, input) features of a layer's four matrix products."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (q + 2 * kv, self.hidden), "o": (self.hidden, q), "gate and up": (2 * self.mlp, self.hidden),
            "down": (self.hidden, self.mlp),
        }  # fmt: skip


ALL_WIDTHS = (
    Widths("135M", "smollm2-135m", 576, 1536, 9, 3, 64, 49152, 16384),
    Widths("1B", "llama-3.2-1b", 2048, 8192, 32, 8, 64, 128256, 8192),
    Widths("8B", "llama-3.1-8b", 4096, 14336, 32, 8, 128, 128256, 4096),
)
