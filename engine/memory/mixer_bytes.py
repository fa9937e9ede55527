"""Estimate the bytes that a library's token mixer allocates, from its shape. No torch.

The mixer is the library's code, so this is no count of ours but an upper estimate of what its
autograd graph saves (`graph`), and of the peak above that. A test compares it with the tensors that
transformers' torch operations save and allocate. What flash-linear-attention keeps follows from its
source: 16-bit queries, keys and values, and one [CHUNK, CHUNK] matrix a chunk and head.

Shape letters: T tokens, D hidden, H value heads, C channels of the convolution, V features of all
values, N features of all keys once each value head has its own, S values of all states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.shape.mixer_shape import CHUNK, MixerShape

SMALL = 48  # bytes a token and head: decays, time steps and norms of a head


@dataclass(frozen=True)
class MixerBytes:
    """The bytes of one mixer.

    - graph: saved from forward to backward, its output included and its input left out.
    - extra: what a pass with that graph allocates above it, forward or backward.
    - alone: the peak of a pass without gradients.
    """

    graph: int
    extra: int
    alone: int

    @classmethod
    def of(
        cls, mixer: MixerShape, hidden_size: int, tokens: int, sample_tokens: int, element: int, documents: int = 0
    ) -> MixerBytes:
        """Return the bytes for `tokens` in samples of `sample_tokens`, `element` bytes a value.

        documents: of a padded row whose boundaries the device alone knows, its places for samples; else
        0. Such a row has zeros between its samples, in copies of input and output, and room for the
        states of as many chunks as any samples may have (engine/layers/library/library_mixer.py).
        """
        if documents:
            wide = tokens + (mixer.conv_width - 1) * documents
            chunks = (wide + (CHUNK - 1) * documents) // CHUNK
            parts, copy = _with_kernels(mixer, hidden_size, element, CHUNK * chunks / wide), wide * element * hidden_size
            graph, extra, alone = (math.ceil(wide * part) for part in parts)
            return cls(graph + copy, extra + copy, alone + 2 * copy)
        length = min(tokens, sample_tokens)
        padded = math.ceil(tokens / length) * math.ceil(length / CHUNK) * CHUNK
        parts = _with_kernels(mixer, hidden_size, element) if mixer.has_kernels else _by_torch(mixer, hidden_size, element)
        return cls(*(math.ceil(padded * part) for part in parts))


def _by_torch(mixer: MixerShape, hidden_size: int, element: int) -> tuple[int, int, int]:
    """Return graph, extra and alone, in bytes a token, of `torch_chunk_gated_delta_rule`.

    It computes in fp32. It saves eight tensors of keys' size (queries and keys as normalised, padded
    and decayed, and keys times beta and as solved), three of values' size, a state a chunk, and five
    matrices of a chunk.
    """
    C, V, N, H = mixer.convolved, mixer.values, mixer.repeated_keys, mixer.value_heads
    states, chunks = 4 * N * mixer.value_dim // CHUNK, 4 * H * CHUNK
    graph = 2 * element * C + 4 * (8 * N + 3 * V) + states + 5 * chunks + _gated_norm(mixer, hidden_size, element)
    extra = 16 * max(V, N) + element * (C + hidden_size)
    alone = 4 * (5 * N + 4 * V) + 6 * max(0, V - N) + 3 * chunks + element * (C + V + 2 * N + hidden_size) + SMALL * H
    return graph, extra, alone


def _with_kernels(mixer: MixerShape, hidden_size: int, element: int, places: float = 1.0) -> tuple[float, float, float]:
    """Return graph, extra and alone, in bytes a token, with flash-linear-attention's rule.

    The convolution and the gated norm are the library's torch operations. A backward pass makes w, u,
    new values and states again, and then the gradients of all. places: of states for each that there is.
    """
    C, V, N, H = mixer.convolved, mixer.values, mixer.repeated_keys, mixer.value_heads
    states, chunks = places * (element * N * mixer.value_dim // CHUNK), 4 * H * CHUNK
    graph = 2 * element * C + element * (2 * N + V + H * CHUNK) + _gated_norm(mixer, hidden_size, element)
    forward = element * (N + 3 * V) + states + chunks
    extra = max(forward, element * (5 * N + 6 * V) + 2 * states) + element * (C + hidden_size)
    alone = element * (2 * C + 2 * V + 2 * N + hidden_size) + forward + SMALL * H
    return graph, extra, alone


def _gated_norm(mixer: MixerShape, hidden_size: int, element: int) -> int:
    """Return the bytes a token of the gated norm, the output projection and all that is one value a head."""
    return (12 + 2 * element) * mixer.values + element * hidden_size + SMALL * mixer.value_heads
