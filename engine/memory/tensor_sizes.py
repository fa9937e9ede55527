"""Count the bytes of each tensor of one decoder layer. No torch.

Shape letters: T tokens, D hidden, F MLP hidden, H query heads, G key/value heads, K head dim, L
tokens of one sample, P features of a per-layer input.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.memory.mixer_bytes import MixerBytes
from engine.shape.compute_limits import MLP_TILE_TOKENS, SAMPLE_ROWS, heads_with_stored_scores, score_cells
from engine.shape.families import Family
from engine.shape.model_shape import ModelShape


@dataclass(frozen=True)
class Sizes:
    """The bytes of one layer's tensors: x [T, D], q [T, H, K], k [T, G, K], f [T, F], low [T, 1], p [T, P].

    qkv is what the layer projects of queries, keys and values. gate_up is [T, 2 F], or [T, F] without
    a gate. inputs are the p of all layers. mixer
    is None in a layer with attention.

    heads [T, H] is fp32. scores [H, T, L] and one sample's [H, L, L] count one byte a value.
    weights maps each group to its dequantised weights, 0 if not packed. tile is for one tile of the
    MLP.
    """

    x: int
    q: int
    k: int
    qkv: int
    f: int
    gate_up: int
    p: int
    inputs: int
    low: int
    heads: int
    tiled_workspace: int
    scores: int
    sample_scores: int
    weights: dict[str, int]
    packed: bool
    element: int
    tokens: int
    documents: int = 0
    mixer: MixerBytes | None = None
    tile: Sizes | None = None

    @classmethod
    def of(
        cls, shape: ModelShape, tokens: int, sample_tokens: int, element: int, packed: bool, documents: int = 0
    ) -> Sizes:
        """Return the sizes for `tokens` in samples of `sample_tokens`, `element` bytes a value.

        documents: samples for which a padded row has places, 0 if the row is not padded.
        """
        length = min(tokens, sample_tokens)
        return cls(
            x=element * tokens * shape.hidden_size,
            q=element * tokens * shape.num_heads * shape.head_dim,
            k=element * tokens * shape.num_kv_heads * shape.head_dim,
            qkv=element * tokens * sum(shape.projections()[name][0] for name in shape.groups.get("qkv", ())),
            f=element * tokens * shape.intermediate_size,
            gate_up=element * tokens * shape.intermediate_size * (2 if shape.has_gate else 1),
            p=element * tokens * shape.input_width,
            inputs=element * tokens * shape.input_width * shape.num_layers,
            low=element * tokens,
            heads=4 * tokens * shape.num_heads,
            tiled_workspace=_tiled_workspace(shape, tokens, length, element),
            scores=shape.num_heads * tokens * length,
            sample_scores=shape.num_heads * length * length,
            weights={group: packed * element * number for group, number in shape.weights_of_groups.items()},
            packed=packed,
            element=element,
            tokens=tokens,
            documents=documents,
            mixer=shape.mixer and MixerBytes.of(shape.mixer, shape.hidden_size, tokens, sample_tokens, element, documents),
            tile=cls.of(shape, MLP_TILE_TOKENS, sample_tokens, element, packed) if tokens > MLP_TILE_TOKENS else None,
        )

    @property
    def eager_graph(self) -> int:
        """Return the bytes that autograd keeps of eager attention.

        They are tanh and softmax in fp32, the rounded weights, and keys and values repeated for all
        heads.
        """
        return (8 + self.element) * self.scores + self._repeated

    @property
    def eager_workspace(self) -> int:
        """Return the bytes of a sample's gradients of scores, and of those of q and the repeated k and v."""
        return 12 * self.sample_scores + 6 * self.q

    @property
    def flash_workspace(self) -> int:
        """Return the workspace of attention's backward pass: flash, cuDNN or memory-efficient.

        It is dq in fp32, dk and dv of each query head, and dout * out summed over K. Flash attention
        gives each sample SAMPLE_ROWS rows more of dq and of the sum.
        """
        rows = self.tokens + SAMPLE_ROWS * self.documents
        return (4 * self.q // self.element + self.heads) // self.tokens * rows + self._repeated

    def unfused_graph(self, layer: Family, eager_scores: int, dropout: bool) -> int:
        """Return the bytes that autograd keeps of one of transformers' own layers, without its input.

        They are fp32 copies in the norms and inputs of adapted matmuls. Attention adds its queries,
        keys, values and output; the MLP adds gate, its activation, up and their product, or up and its activation. Dropout
        adds each projection's masked input and mask.
        """
        norms = (layer.attention.number + layer.mlp.number) * self.x + (self.q + self.k if layer.qk_norm != "none" else 0)
        kept = 4 * norms // self.element + 2 * self.x + self.unfused_attention + 2 * self.gate_up + 10 * eager_scores
        return kept + (3 * (5 * self.x + self.q + self.f) // 2 if dropout else 0)

    @property
    def unfused_attention(self) -> int:
        """Return the bytes of queries, keys, values, output and log-sum-exp."""
        return self.qkv + self.q + self.heads

    @property
    def _repeated(self) -> int:
        return 2 * self.q if self.q != self.k else 0


def _tiled_workspace(shape: ModelShape, tokens: int, longest: int, element: int) -> int:
    """Return the workspace of our attention's backward pass: stored scores, or dout * out summed over K."""
    if shape.mixer is not None:
        return 0
    heads = {"heads": shape.num_heads, "groups": shape.num_kv_heads, "head_dim": shape.head_dim, "element": element}
    sizes = [4 * tokens * shape.num_heads]
    window = shape.sliding_window if shape.attention_softcap else None  # heads too wide for flash attention see all
    for keys in {longest, min(longest, window or longest)}:
        sizes.append(2 * element * heads_with_stored_scores(tokens, keys, **heads) * score_cells(tokens, keys))
    return max(sizes)
